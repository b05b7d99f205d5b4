package facts

// Notifier is what a container's seccomp filter says to whoever hears of the
// calls that it denies. It goes through the runtime as metadata of the filter.
type Notifier struct {
	// Stop ends the container for any such call.
	Stop bool `json:"stop,omitempty"`
	// Default is for calls that Denials do not name.
	Default Denial            `json:"default"`
	Denials map[string]Denial `json:"denials,omitempty"`
}

// Denial is how a system call is denied: the error number that it returns, or
// EndsProcess.
type Denial uint32

// EndsProcess denies a call by the end of the process that makes it.
const EndsProcess Denial = 0

// Of is how the named call is denied.
func (n Notifier) Of(call string) Denial {
	if d, ok := n.Denials[call]; ok {
		return d
	}
	return n.Default
}

// DeniedCall is a system call that a container's filter has denied.
type DeniedCall struct {
	// Name is as in "mount".
	Name string
	// Stop says that the container is to end for it, Ends that it ends by it:
	// its first process does.
	Stop, Ends bool
}
