package selinux

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/record"
)

// context is a label taken apart. level is "" where the policy has none; it may
// have colons.
type context struct{ user, role, kind, level string }

func parse(label string) (context, error) {
	f := strings.SplitN(label, ":", 4)
	if len(f) < 3 {
		return context{}, fmt.Errorf("%.256q is no SELinux label: %w", label, errdefs.ErrInvalidArgument)
	}
	c := context{user: f[0], role: f[1], kind: f[2]}
	if len(f) == 4 {
		c.level = f[3]
	}
	return c, nil
}

func (c context) String() string {
	s := c.user + ":" + c.role + ":" + c.kind
	if c.level != "" {
		s += ":" + c.level
	}
	return s
}

// sensitivity is the part of the level before its categories.
func (c context) sensitivity() string {
	s, _, _ := strings.Cut(c.level, ":")
	s, _, _ = strings.Cut(s, "-")
	return s
}

// Container returns the labels of a container in a pod: the pod's, with what
// the container's options say. The type is the processes' alone; the level is
// one for both, or the container could not read its own files.
func Container(pod record.Labels, o *cri.SELinuxOption) (record.Labels, error) {
	if pod.Process == "" || o == nil {
		return pod, nil
	}
	level := o.GetLevel()
	if level == "" {
		c, err := parse(pod.Process)
		if err != nil {
			return record.Labels{}, err
		}
		level = c.level
	}
	out, err := compose(pod.Process, pod.Mount, level, o)
	if err != nil {
		return record.Labels{}, fmt.Errorf("config.linux.security_context.selinux_options: %w", err)
	}
	return out, nil
}

// compose makes the labels of a process and of its files.
func compose(process, file, level string, o *cri.SELinuxOption) (record.Labels, error) {
	for field, value := range map[string]string{"user": o.GetUser(), "role": o.GetRole(), "type": o.GetType()} {
		if !word(value, "") {
			return record.Labels{}, fmt.Errorf("%s: %.256q: %w", field, value, errdefs.ErrInvalidArgument)
		}
	}
	if !word(level, ":,.-") {
		return record.Labels{}, fmt.Errorf("level: %.256q: %w", level, errdefs.ErrInvalidArgument)
	}
	p, err := parse(process)
	if err != nil {
		return record.Labels{}, err
	}
	f, err := parse(file)
	if err != nil {
		return record.Labels{}, err
	}
	for _, part := range []struct {
		value string
		into  *string
	}{{o.GetUser(), &p.user}, {o.GetRole(), &p.role}, {o.GetType(), &p.kind}, {o.GetUser(), &f.user}, {level, &p.level}, {level, &f.level}} {
		if part.value != "" {
			*part.into = part.value
		}
	}
	return record.Labels{Process: p.String(), Mount: f.String()}, nil
}

// word reports whether s has letters, digits and signs of names alone, and
// those that are allowed besides.
func word(s, besides string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_"+besides, r)
	})
}
