package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/version"

	"github.com/gantry-cri/gantry/plugin/advisory"
)

// askTimeout bounds one question for a version.
const askTimeout = 5 * time.Second

func (n Node) runtimes(ctx context.Context) []Finding {
	l := &list{area: "runtime"}
	for _, name := range n.Layout.Shims {
		if path, ok := n.find(name, n.Path); ok {
			l.ok(name, "%s", path)
			continue
		}
		need := "a runtime handler needs it"
		if name == n.Layout.DefaultShim {
			need = "the default runtime handler needs it"
		}
		l.add(name, Warn, "install it on the daemon's PATH or beside the daemon, or set default_runtime_name to another handler",
			"%s, and it is not found on this PATH; the daemon also looks beside its own program", need)
	}
	for _, name := range n.Layout.Runtimes {
		path, ok := n.find(name, n.Path)
		if !ok {
			l.add(name, Fail, "install it (Debian: apt-get install runc) or set BinaryName in the handler's options; if the daemon has another PATH, give this command the same",
				"a runtime handler runs it, and it is not found on this PATH: %s", strings.Join(n.Path, ":"))
			continue
		}
		n.runtime(ctx, l, name, path)
	}
	return l.all
}

func (n Node) runtime(ctx context.Context, l *list, name, path string) {
	says, err := n.Versions.Runtime(ctx, n.path(path))
	if err != nil {
		l.add(name, Fail, "run it by hand: "+path+" --version", "%s does not tell its version: %v", path, err)
		return
	}
	kind, _, _ := strings.Cut(says, " ")
	v := advisory.Find(says)
	switch {
	case v == nil:
		l.add(name, Warn, "", "%s tells no version that could be understood: %.80q", path, says)
	case kind != "runc":
		// No list of weaknesses is kept for others.
		l.ok(name, "%s, %s %s", path, kind, v)
	default:
		runc(l, name, path, says)
	}
}

// runc holds runc against the known weaknesses.
func runc(l *list, name, path, says string) {
	v := advisory.Find(says)
	found := advisory.Runc(v)
	for _, a := range found {
		status, advice := Warn, "update runc to 1.2.8, 1.3.6, 1.4.3, 1.5.0 or a later one of these lines"
		if a.Escape {
			status = Fail
		}
		if advisory.Patched(v) {
			status, advice = Warn, "this is a distribution's build that may hold the correction under an old number: look for the CVE in its changelog"
		}
		l.add(name, status, advice, "%s is runc %s: %s", path, v, a)
	}
	if len(found) == 0 {
		l.ok(name, "%s, runc %s", path, v)
	}
}

// Programs is Versions by running the programs.
type Programs struct{}

// Runtime implements Versions.
func (Programs) Runtime(ctx context.Context, path string) (string, error) {
	out, _, err := run(ctx, path, []string{"--version"}, nil)
	return strings.TrimSpace(string(out)), err
}

// Plugin implements Versions.
func (Programs) Plugin(ctx context.Context, path string) (about string, specs []string, err error) {
	out, _, err := run(ctx, path, nil, []string{"CNI_COMMAND=VERSION"})
	if err != nil {
		return "", nil, err
	}
	info, err := (&version.PluginDecoder{}).Decode(out)
	if err != nil {
		return "", nil, err
	}
	// Without a command the reference plugins introduce themselves; others
	// may fail, and are of unknown version then.
	_, says, err := run(ctx, path, nil, nil)
	if err != nil {
		return "", info.SupportedVersions(), nil
	}
	first, _, _ := strings.Cut(string(says), "\n")
	return first, info.SupportedVersions(), nil
}

// run returns what a program writes that gets no input and not much time.
func run(ctx context.Context, path string, args, env []string) (stdout, stderr []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = append(os.Environ(), env...), &out, &errs, time.Second
	err = cmd.Run()
	if ctx.Err() != nil {
		return nil, nil, fmt.Errorf("no answer within %s: %w", askTimeout, context.Cause(ctx))
	}
	if err != nil && errs.Len() > 0 {
		err = fmt.Errorf("%w: %.200s", err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), errs.Bytes(), err
}
