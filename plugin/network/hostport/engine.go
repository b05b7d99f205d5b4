package hostport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// Engine names a way to map ports.
type Engine string

// The engines; the zero value stands for the first of them that works.
const (
	NFTables Engine = "nftables"
	IPTables Engine = "iptables"
)

// pick chooses the engine, once it is found for good, and takes back what an
// earlier daemon had with another one: its ports are mapped anew as its pods are
// looked at. With need it looks again if there was none.
func (t *Table) pick(ctx context.Context, need bool) error {
	if _, none := t.engine.(noEngine); t.engine != nil && !(none && need) {
		return nil
	}
	chosen := t.find(ctx)
	if err := t.clearOthers(ctx, chosen); err != nil {
		return err
	}
	t.engine = chosen
	return nil
}

// find probes the engines. The tools of iptables are asked for only if they are
// wanted: programs of the kind load modules into the kernel.
func (t *Table) find(ctx context.Context) engine {
	nft := nfTables{t.options.Name}
	var reason error
	if t.options.Engine != IPTables {
		if reason = nft.probe(); reason == nil || t.options.Engine == NFTables {
			return nft
		}
	}
	ipt, err := findIPTables(ctx, t.options.Name, t.options.Note)
	if err != nil {
		return noEngine{fmt.Errorf("%w: %w", errNoEngine, errors.Join(reason, err))}
	}
	if reason != nil {
		log.G(ctx).WithError(reason).Info("host ports are mapped by iptables, as there is no nftables")
	}
	return ipt
}

// clearOthers takes back what other engines have. Tools that are gone keep nothing
// from going on: what they made is tried again after the next start.
func (t *Table) clearOthers(ctx context.Context, chosen engine) error {
	if nft := (nfTables{t.options.Name}); chosen != engine(nft) {
		have, err := nft.read(ctx)
		if err == nil {
			err = clear(ctx, nft, have)
		}
		if err != nil {
			return fmt.Errorf("take back the rules of nftables: %w", err)
		}
	}
	noted, err := os.ReadFile(t.options.Note)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read which engine has host ports: %w", err)
	}
	suffix := strings.TrimSpace(strings.TrimPrefix(string(noted), string(IPTables)))
	if x, ok := chosen.(*ipTables); ok && x.suffix == suffix {
		return nil
	}
	old := &ipTables{name: t.options.Name, note: t.options.Note, suffix: suffix, v6: true}
	have, err := old.read(ctx)
	if err == nil {
		err = clear(ctx, old, have)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("host ports: rules of iptables that an earlier daemon made may be left")
		return nil
	}
	return old.forgetNote()
}

// noEngine is where there is none.
type noEngine struct{ reason error }

func (n noEngine) read(context.Context) (content, error) { return content{}, nil }

func (n noEngine) write(context.Context, content, content) error {
	return fmt.Errorf("%w: %w", n.reason, errdefs.ErrFailedPrecondition)
}

func (n noEngine) remove(context.Context) error { return nil }

func (n noEngine) generation() string { return "" }
