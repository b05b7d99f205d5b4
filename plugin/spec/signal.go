package spec

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Real-time signals. The C libraries keep the first for themselves and do not
// agree on how many; images and runtimes count as glibc does.
const (
	rtMin = 34
	rtMax = 64
)

// Signal is a signal by name and number.
type Signal struct {
	Name   string
	Number unix.Signal
}

var signalAliases = map[string]string{"SIGCLD": "SIGCHLD", "SIGIOT": "SIGABRT", "SIGPOLL": "SIGIO"}

// ContainerSignal is StopSignal for a container, of which systemd has a signal
// of its own where neither names one.
func ContainerSignal(in ContainerInput) (Signal, error) {
	if in.Systemd {
		in.ImageConfig = systemdImage(in.ImageConfig)
	}
	return StopSignal(in.Config, in.ImageConfig)
}

// StopSignal returns the signal that ends a container gracefully: the CRI's,
// else the image's, else SIGTERM.
func StopSignal(cfg *cri.ContainerConfig, image imagespec.ImageConfig) (Signal, error) {
	if s := cfg.GetStopSignal(); s != cri.Signal_SIGNAL_RUNTIME_DEFAULT {
		name, ok := cri.Signal_name[int32(s)]
		if !ok {
			return Signal{}, fmt.Errorf("config.stop_signal: %d is unknown: %w", s, errdefs.ErrInvalidArgument)
		}
		name = strings.TrimPrefix(name, "SIGNAL_")
		name = strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(name)
		sig, err := ParseSignal(name)
		if err != nil {
			return Signal{}, fmt.Errorf("config.stop_signal: %w", err)
		}
		return sig, nil
	}
	if image.StopSignal == "" {
		return Signal{Name: "SIGTERM", Number: unix.SIGTERM}, nil
	}
	sig, err := ParseSignal(image.StopSignal)
	if err != nil {
		return Signal{}, fmt.Errorf("STOPSIGNAL of the image: %w", err)
	}
	return sig, nil
}

// ParseSignal reads a signal as images write it: a number or a name, with or
// without SIG, in any case, real-time ones as RTMIN+n and RTMAX-n.
func ParseSignal(s string) (Signal, error) {
	bad := fmt.Errorf("%.32q is not a signal: %w", s, errdefs.ErrInvalidArgument)
	if n, err := strconv.ParseUint(s, 10, 8); err == nil {
		return numbered(int(n), bad)
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if strings.HasPrefix(name, "SIGRT") {
		return realtime(name, bad)
	}
	if a, ok := signalAliases[name]; ok {
		name = a
	}
	if n := unix.SignalNum(name); n != 0 {
		return Signal{Name: name, Number: n}, nil
	}
	return Signal{}, bad
}

func numbered(n int, bad error) (Signal, error) {
	if n >= rtMin && n <= rtMax {
		return Signal{Name: realtimeName(n), Number: unix.Signal(n)}, nil
	}
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return Signal{Name: name, Number: unix.Signal(n)}, nil
	}
	return Signal{}, bad
}

// realtime reads SIGRTMIN, SIGRTMIN+n, SIGRTMAX and SIGRTMAX-n.
func realtime(name string, bad error) (Signal, error) {
	start, sign, offset := rtMin, 1, ""
	switch {
	case name == "SIGRTMIN", name == "SIGRTMAX":
		offset = "0"
	case strings.HasPrefix(name, "SIGRTMIN+"), strings.HasPrefix(name, "SIGRTMAX-"):
		offset = name[len("SIGRTMIN+"):]
	}
	if strings.HasPrefix(name, "SIGRTMAX") {
		start, sign = rtMax, -1
	}
	d, err := strconv.ParseUint(offset, 10, 8)
	n := start + sign*int(d)
	if err != nil || n < rtMin || n > rtMax {
		return Signal{}, bad
	}
	return Signal{Name: realtimeName(n), Number: unix.Signal(n)}, nil
}

// realtimeName counts from the nearer end, as the CRI's names do.
func realtimeName(n int) string {
	switch {
	case n == rtMin:
		return "SIGRTMIN"
	case n == rtMax:
		return "SIGRTMAX"
	case n <= rtMin+15:
		return fmt.Sprintf("SIGRTMIN+%d", n-rtMin)
	}
	return fmt.Sprintf("SIGRTMAX-%d", rtMax-n)
}

// CRI returns the signal as the CRI reports it.
func (s Signal) CRI() cri.Signal {
	name := strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(s.Name)
	return cri.Signal(cri.Signal_value["SIGNAL_"+name])
}
