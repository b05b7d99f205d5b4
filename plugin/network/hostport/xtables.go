package hostport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// ipTables is the engine of rules of iptables, for kernels without nftables. A
// change is made by a run of iptables-restore for each table that it concerns.
type ipTables struct {
	name, note string
	// suffix of the names of the tools: "-legacy", or none.
	suffix string
	// v6 says that there is NAT for IPv6, counted that the kernel counts changes.
	v6, counted bool
	// found is what was read last, by parts.
	found []found
}

// findIPTables looks for tools that work: those that the node's owner chose, else
// those for kernels without nftables.
func findIPTables(ctx context.Context, name, note string) (*ipTables, error) {
	var errs []error
	for _, suffix := range []string{"", "-legacy"} {
		x := &ipTables{name: name, note: note, suffix: suffix}
		if _, err := x.save(ctx, true, "nat"); err != nil {
			errs = append(errs, err)
			continue
		}
		_, err := x.save(ctx, false, "nat")
		x.v6 = err == nil
		version, err := x.run(ctx, x.tool(true, "save"), "", "-V")
		x.counted = err == nil && strings.Contains(version, "nf_tables")
		return x, nil
	}
	return nil, errors.Join(errs...)
}

// read asks for every part.
func (x *ipTables) read(ctx context.Context) (content, error) {
	out := content{owners: map[element]string{}, whole: true}
	x.found = nil
	for _, p := range parts(x.name) {
		f := found{}
		if p.v4 || x.v6 {
			text, err := x.save(ctx, p.v4, p.table)
			if err != nil {
				return out, fmt.Errorf("read rules: %w", err)
			}
			f = parseSaved(text, x.name)
		}
		f.content(p, &out)
		out.exists = out.exists || !f.empty()
		x.found = append(x.found, f)
	}
	slices.Sort(out.opened)
	for i, p := range parts(x.name) {
		out.whole = out.whole && x.found[i].whole(p, p.rules(out))
	}
	return out, nil
}

// write changes the parts that are not as they should be.
func (x *ipTables) write(ctx context.Context, have, want content) error {
	if err := os.WriteFile(x.note, []byte(string(IPTables)+x.suffix+"\n"), 0o600); err != nil {
		return fmt.Errorf("note that iptables has host ports: %w", err)
	}
	for i, p := range parts(x.name) {
		rules := p.rules(want)
		if have.whole && slices.Equal(p.rules(have), rules) || x.found[i].empty() && len(rules) == 0 {
			continue
		}
		if !p.v4 && !x.v6 {
			return fmt.Errorf("write rules: the node has no working %s, or its kernel no NAT for IPv6: %w", x.tool(false, "restore"), errdefs.ErrFailedPrecondition)
		}
		if err := x.restore(ctx, p, x.found[i].script(p, rules)); err != nil {
			return err
		}
	}
	return nil
}

// remove ends the chains, the guard last.
func (x *ipTables) remove(ctx context.Context) error {
	for i, p := range slices.Backward(parts(x.name)) {
		if x.found[i].empty() {
			continue
		}
		if err := x.restore(ctx, p, x.found[i].script(p, nil)); err != nil {
			return err
		}
	}
	return x.forgetNote()
}

func (x *ipTables) forgetNote() error {
	if err := os.Remove(x.note); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget that iptables has host ports: %w", err)
	}
	return nil
}

// generation counts changes where the tools are those that write nftables.
func (x *ipTables) generation() string {
	if !x.counted {
		return ""
	}
	return generation()
}

func (x *ipTables) tool(v4 bool, verb string) string {
	base := "ip6tables"
	if v4 {
		base = "iptables"
	}
	return base + x.suffix + "-" + verb
}

func (x *ipTables) save(ctx context.Context, v4 bool, table string) (string, error) {
	return x.run(ctx, x.tool(v4, "save"), "", "-t", table)
}

// lockWait is how many seconds the tool waits for others of its kind.
const lockWait = "5"

func (x *ipTables) restore(ctx context.Context, p part, script string) error {
	if _, err := x.run(ctx, x.tool(p.v4, "restore"), script, "-w", lockWait, "--noflush"); err != nil {
		return fmt.Errorf("write rules: %w", err)
	}
	return nil
}

// toolTime is what a run of a tool may take.
const toolTime = 15 * time.Second

// run runs a tool, which ends with the daemon: a later one must not find that it
// changes what it has just read.
func (x *ipTables) run(ctx context.Context, tool, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, toolTime)
	defer cancel()
	c := exec.CommandContext(ctx, tool, args...)
	var out, complaint bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &complaint
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = time.Second
	runtime.LockOSThread() // the signal is for the end of the thread
	defer runtime.UnlockOSThread()
	err := c.Run()
	switch {
	case err == nil:
		return out.String(), nil
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return "", fmt.Errorf("%s: %w: %s: %w", tool, err, strings.TrimSpace(complaint.String()), errdefs.ErrInternal)
}
