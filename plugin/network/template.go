package network

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containernetworking/cni/libcni"
)

// renderedConf is the name that nodes already have from stock containerd: the
// file found there is used, not doubled.
const renderedConf = "10-containerd-net.conflist"

// templateFields is what a configuration template can use.
type templateFields struct {
	// PodCIDR is the first range, PodCIDRRanges all of them.
	PodCIDR       string
	PodCIDRRanges []string
	// Routes are the default routes of the families in PodCIDRRanges.
	Routes []string
}

// UpdatePodCIDR renders the template into the configuration directory with the
// node's pod ranges, a comma-separated list. It does nothing when there is no
// range, no template, or a network configuration already.
func (n *Networks) UpdatePodCIDR(ctx context.Context, cidrs string) error {
	if cidrs == "" || n.conf.ConfTemplate == "" {
		return nil
	}
	fields, err := fieldsOf(cidrs)
	if err != nil {
		return fmt.Errorf("update pod ranges: %w", err)
	}
	if _, err := n.load(n.source(Attachment{})); err == nil {
		log.G(ctx).Info("a network configuration is there, the template is not used")
		return nil
	}
	if err := n.render(fields); err != nil {
		return fmt.Errorf("update pod ranges: %w", err)
	}
	select {
	case n.kick <- struct{}{}:
	default: // Run has not taken the last one yet
	}
	return nil
}

func (n *Networks) render(fields templateFields) error {
	t, err := template.ParseFiles(n.conf.ConfTemplate)
	if err != nil {
		return fmt.Errorf("read template: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, fields); err != nil {
		return fmt.Errorf("render template: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	list, err := libcni.NetworkConfFromBytes(out.Bytes())
	if err == nil {
		err = checkConf(list)
	}
	if err != nil {
		return fmt.Errorf("the rendered template is no configuration: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err := os.MkdirAll(n.conf.ConfDir, 0o755); err != nil {
		return err
	}
	f, err := atomicfile.New(filepath.Join(n.conf.ConfDir, renderedConf), 0o644)
	if err != nil {
		return err
	}
	if _, err := f.Write(out.Bytes()); err != nil {
		_ = f.Cancel()
		return err
	}
	return f.Close()
}

// fieldsOf parses the ranges of the node.
func fieldsOf(cidrs string) (templateFields, error) {
	var f templateFields
	var v4, v6 bool
	for c := range strings.SplitSeq(cidrs, ",") {
		c = strings.TrimSpace(c)
		p, err := netip.ParsePrefix(c)
		if err != nil {
			return templateFields{}, fmt.Errorf("pod_cidr: %q: %w: %w", c, err, errdefs.ErrInvalidArgument)
		}
		if p.Addr().Is4() {
			v4 = true
		} else {
			v6 = true
		}
		f.PodCIDRRanges = append(f.PodCIDRRanges, c)
	}
	f.PodCIDR = f.PodCIDRRanges[0]
	if v4 {
		f.Routes = append(f.Routes, "0.0.0.0/0")
	}
	if v6 {
		f.Routes = append(f.Routes, "::/0")
	}
	return f, nil
}
