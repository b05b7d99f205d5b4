package spec

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/facts"
)

// notified is a container under the default profile whose pod and which itself
// have the annotation with these values, "-" for none.
func notified(pod, own string, change func(*ContainerInput)) ContainerInput {
	return newInput(func(in *ContainerInput) {
		in.Handler = Handler{SeccompNotify: true, AllowedAnnotations: []string{config.AnnotationNotifier, config.AnnotationNotifierOld}}
		in.NotifierSocket = "/run/x.sock"
		in.Config.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		if pod != "-" {
			in.Pod.Annotations = map[string]string{config.AnnotationNotifierOld: pod}
		}
		if own != "-" {
			in.Config.Annotations = map[string]string{config.AnnotationNotifier: own}
		}
		if change != nil {
			change(in)
		}
	})
}

func TestNotifierAnnotation(t *testing.T) {
	for name, tc := range map[string]struct {
		pod, own   string
		told, stop bool
		change     func(*ContainerInput)
	}{
		"none":                   {"-", "-", false, false, nil},
		"pod":                    {"", "-", true, false, nil},
		"pod stops":              {"stop", "-", true, true, nil},
		"container goes first":   {"stop", "", true, false, nil},
		"container stops":        {"-", "stop", true, true, nil},
		"not allowed":            {"stop", "stop", false, false, func(in *ContainerInput) { in.Handler.AllowedAnnotations = nil }},
		"nothing to be told of":  {"stop", "-", false, false, func(in *ContainerInput) { in.Config.Linux.SecurityContext.Seccomp = nil }},
		"not allowed but absurd": {"absurd", "-", false, false, func(in *ContainerInput) { in.Handler.AllowedAnnotations = nil }},
	} {
		s, err := Container(notified(tc.pod, tc.own, tc.change))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if told := s.Linux.Seccomp != nil && s.Linux.Seccomp.ListenerPath == "/run/x.sock"; told != tc.told {
			t.Errorf("%s: told %v", name, told)
		}
		if tc.told {
			if n := notifierOf(t, s.Linux.Seccomp); n.Stop != tc.stop || n.Default != 1 {
				t.Errorf("%s: %+v", name, n)
			}
		}
	}
	_, err := Container(notified("log", "-", nil))
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("another value: %v", err)
	}
	_, err = Container(notified("", "-", func(in *ContainerInput) { in.Handler.SeccompNotify = false }))
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a runtime that cannot: %v", err)
	}
	_, err = telling(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, ListenerPath: "/other"}, "/run/x.sock", false)
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a profile that tells somebody else: %v", err)
	}
}

func notifierOf(t *testing.T, f *specs.LinuxSeccomp) (n facts.Notifier) {
	t.Helper()
	if err := json.Unmarshal([]byte(f.ListenerMetadata), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// actions are the rules for a call, as "ACTION" or "ACTION if CONDITION".
func actions(f *specs.LinuxSeccomp, name string) (list []string) {
	for _, rule := range f.Syscalls {
		if !slices.Contains(rule.Names, name) {
			continue
		}
		text := string(rule.Action)[len("SCMP_ACT_"):]
		for _, a := range rule.Args {
			text += fmt.Sprintf(" if %d %s %x %x", a.Index, a.Op[len("SCMP_CMP_"):], a.Value, a.ValueTwo)
		}
		list = append(list, text)
	}
	return list
}

func TestTellingFilter(t *testing.T) {
	in := specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"mkdir", "openat2"}, Action: specs.ActAllow},
		{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Value: 8, Op: specs.OpLessThan}}},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Value: 1, Op: specs.OpEqualTo}}},
		{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Value: 2, Op: specs.OpEqualTo}}},
		{Names: []string{"clone"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Value: 0x30, Op: specs.OpMaskedEqual}}},
		{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: new(uint(38))},
		{Names: []string{"chroot", "write"}, Action: specs.ActErrno, ErrnoRet: new(uint(13))},
		{Names: []string{"reboot"}, Action: specs.ActKillProcess},
		{Names: []string{"ptrace"}, Action: specs.ActLog},
	}}
	out, err := telling(&in, "/run/x.sock", false)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"mkdir":       {"ALLOW"},
		"mount":       {"NOTIFY"}, // by default
		"read":        nil,        // denied by default, and the runtime needs it
		"mseal":       nil,        // newer than the profile
		"personality": {"ALLOW if 0 LT 8 0", "NOTIFY if 0 GE 8 0"},
		"socket":      {"ALLOW if 0 EQ 1 0", "ALLOW if 0 EQ 2 0"}, // rules cannot say the rest
		"clone":       {"ALLOW if 0 MASKED_EQ 30 0", "NOTIFY if 0 MASKED_EQ 10 10", "NOTIFY if 0 MASKED_EQ 20 20"},
		"clone3":      {"ERRNO"},
		"chroot":      {"NOTIFY"},
		"write":       {"ERRNO"},
		"reboot":      {"NOTIFY"},
		"ptrace":      {"LOG"},
	} {
		if got := actions(out, name); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for name, want := range map[string]facts.Denial{"mount": 1, "chroot": 13, "reboot": facts.EndsProcess} {
		if got := notifierOf(t, out).Of(name); got != want {
			t.Errorf("%s is denied by %d", name, got)
		}
	}
	if in.ListenerPath != "" || in.Syscalls[6].Action != specs.ActErrno || len(in.Syscalls[6].Names) != 2 {
		t.Error("the filter that was there is changed")
	}
	in.DefaultAction = specs.ActAllow
	if out, err = telling(&in, "/run/x.sock", false); err != nil || actions(out, "mount") != nil {
		t.Errorf("what is allowed by default is told of: %v", err)
	}
}

// TestOtherwise: of a condition and those that hold otherwise, exactly one side
// holds.
func TestOtherwise(t *testing.T) {
	holds := func(a specs.LinuxSeccompArg, v uint64) bool {
		return map[specs.LinuxSeccompOperator]bool{
			specs.OpEqualTo: v == a.Value, specs.OpNotEqual: v != a.Value, specs.OpLessThan: v < a.Value, specs.OpLessEqual: v <= a.Value,
			specs.OpGreaterThan: v > a.Value, specs.OpGreaterEqual: v >= a.Value, specs.OpMaskedEqual: v&a.Value == a.ValueTwo,
		}[a.Op]
	}
	for _, op := range []specs.LinuxSeccompOperator{
		specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
	} {
		for _, a := range []specs.LinuxSeccompArg{{Op: op, Value: 0b101, ValueTwo: 0b100}, {Op: op, Value: 0b1010, ValueTwo: 0}} {
			for v := range uint64(32) {
				other := slices.ContainsFunc(otherwise(a), func(o specs.LinuxSeccompArg) bool { return holds(o, v) })
				if other == holds(a, v) {
					t.Errorf("%+v of %b: both sides are %v", a, v, other)
				}
			}
		}
	}
}
