package spec

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/facts"
)

// notifierStop is the value of the annotation that ends a container for a call
// which its filter denies.
const notifierStop = "stop"

// addNotifier makes the filter tell of what it denies, if the pod's or the
// container's annotation asks for it. Without a filter nothing is denied.
func addNotifier(in *ContainerInput, l *specs.Linux) error {
	names := []string{config.AnnotationNotifier, config.AnnotationNotifierOld}
	name, value, ok := in.Handler.permittedIn(in.Config.GetAnnotations(), in.Pod, names...)
	if !ok {
		name, value, ok = in.Handler.permitted(in.Pod, names...)
	}
	if !ok {
		return nil
	}
	if value != "" && value != notifierStop {
		return badAnnotation(name, value, `"stop" or empty`)
	}
	if l.Seccomp == nil {
		return nil
	}
	if !in.Handler.SeccompNotify {
		return fmt.Errorf("annotation %s: the runtime of handler %q does not say that it can tell of system calls (SCMP_ACT_NOTIFY): %w", name, in.Handler.Name, errdefs.ErrFailedPrecondition)
	}
	filter, err := telling(l.Seccomp, in.NotifierSocket, value == notifierStop)
	if err != nil {
		return fmt.Errorf("annotation %s: %w", name, err)
	}
	l.Seccomp = filter
	return nil
}

// quietCalls are not told of, but denied as they were: the runtime needs them
// between loading the filter and handing over that by which it tells, and would
// wait for ever.
var quietCalls = []string{
	"clock_gettime", "close", "epoll_pwait", "exit", "exit_group", "futex", "getpid", "gettid", "madvise", "mmap", "munmap",
	"nanosleep", "read", "rt_sigprocmask", "rt_sigreturn", "sched_yield", "sendmsg", "tgkill", "write", "writev",
}

// telling returns the filter changed so that it tells of what it denies at
// socket, where the answer is what the filter's was.
//
// A default cannot be to tell, so the calls that it denies are named one by one:
// those that the filter could know, as one newer than all of which it names is
// taken for one that the kernel lacks. A call that is allowed with some arguments
// is told of with the others, where rules can say which these are.
func telling(f *specs.LinuxSeccomp, socket string, stop bool) (*specs.LinuxSeccomp, error) {
	if f.ListenerPath != "" {
		return nil, fmt.Errorf("the seccomp profile has a listenerPath of its own: %w", errdefs.ErrFailedPrecondition)
	}
	machine, err := arch.GetInfo("")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	}
	out := *f
	n := facts.Notifier{Stop: stop, Default: facts.Denial(unix.EPERM), Denials: map[string]facts.Denial{}}
	rest, unnamed := denialOf(f.DefaultAction, f.DefaultErrnoRet)
	if unnamed {
		n.Default = rest
	}
	out.Syscalls = nil
	for _, rule := range f.Syscalls {
		out.Syscalls = append(out.Syscalls, tellingRule(rule, &n)...)
	}
	if unnamed {
		out.Syscalls = append(out.Syscalls, unnamedRules(f.Syscalls, machine.SyscallNames)...)
	}
	metadata, err := json.Marshal(n)
	if err != nil {
		return nil, fmt.Errorf("encode notifier: %w (%w)", err, errdefs.ErrInternal)
	}
	out.ListenerPath, out.ListenerMetadata = socket, string(metadata)
	return &out, nil
}

// denialOf is how an action denies a call. One that makes it look as if the
// kernel did not have it, or as if it had worked, denies nothing: C libraries
// try new calls first.
func denialOf(a specs.LinuxSeccompAction, errno *uint) (facts.Denial, bool) {
	switch a {
	case specs.ActKill, specs.ActKillThread, specs.ActKillProcess:
		return facts.EndsProcess, true
	case specs.ActErrno:
		if errno == nil {
			return facts.Denial(unix.EPERM), true
		}
		return facts.Denial(*errno), *errno != 0 && *errno != uint(unix.ENOSYS)
	}
	return 0, false
}

// tellingRule is the rule, or what tells of the calls that it denies.
func tellingRule(rule specs.LinuxSyscall, n *facts.Notifier) []specs.LinuxSyscall {
	d, denied := denialOf(rule.Action, rule.ErrnoRet)
	if !denied {
		return []specs.LinuxSyscall{rule}
	}
	told, quiet := rule, rule
	told.Names, quiet.Names = nil, nil
	for _, name := range rule.Names {
		if slices.Contains(quietCalls, name) {
			quiet.Names = append(quiet.Names, name)
			continue
		}
		told.Names = append(told.Names, name)
		if d != n.Default {
			n.Denials[name] = d
		}
	}
	told.Action, told.ErrnoRet = specs.ActNotify, nil
	return slices.DeleteFunc([]specs.LinuxSyscall{told, quiet}, func(r specs.LinuxSyscall) bool { return len(r.Names) == 0 })
}

// unnamedRules tell of the calls that are left to the default by these rules.
func unnamedRules(rules []specs.LinuxSyscall, numbers map[string]int) (list []specs.LinuxSyscall) {
	named, newest := map[string][]specs.LinuxSyscall{}, -1
	for _, rule := range rules {
		for _, name := range rule.Names {
			named[name] = append(named[name], rule)
			if number, ok := numbers[name]; ok {
				newest = max(newest, number)
			}
		}
	}
	never := specs.LinuxSyscall{Action: specs.ActNotify}
	for _, name := range slices.Sorted(maps.Keys(numbers)) {
		switch about := named[name]; {
		case numbers[name] > newest || slices.Contains(quietCalls, name):
		case len(about) == 0:
			never.Names = append(never.Names, name)
		case len(about) == 1 && len(about[0].Args) == 1 && about[0].Action == specs.ActAllow:
			for _, arg := range otherwise(about[0].Args[0]) {
				list = append(list, specs.LinuxSyscall{Names: []string{name}, Action: specs.ActNotify, Args: []specs.LinuxSeccompArg{arg}})
			}
		}
	}
	if len(never.Names) > 0 {
		list = append(list, never)
	}
	return list
}

// opposites are the operators that hold where another one does not.
var opposites = map[specs.LinuxSeccompOperator]specs.LinuxSeccompOperator{
	specs.OpEqualTo: specs.OpNotEqual, specs.OpNotEqual: specs.OpEqualTo,
	specs.OpLessThan: specs.OpGreaterEqual, specs.OpGreaterEqual: specs.OpLessThan,
	specs.OpLessEqual: specs.OpGreaterThan, specs.OpGreaterThan: specs.OpLessEqual,
}

// otherwise are conditions of which one holds if and only if a does not.
func otherwise(a specs.LinuxSeccompArg) (list []specs.LinuxSeccompArg) {
	if op, ok := opposites[a.Op]; ok {
		a.Op = op
		return []specs.LinuxSeccompArg{a}
	}
	if a.Op != specs.OpMaskedEqual {
		return nil
	}
	for bit := uint64(1); bit != 0; bit <<= 1 {
		if a.Value&bit != 0 { // it is not as it is to be
			list = append(list, specs.LinuxSeccompArg{Index: a.Index, Op: a.Op, Value: bit, ValueTwo: ^a.ValueTwo & bit})
		}
	}
	return list
}
