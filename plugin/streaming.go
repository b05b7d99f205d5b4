package plugin

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/config"
	"github.com/gantry-cri/gantry/plugin/container"
	"github.com/gantry-cri/gantry/plugin/network"
	"github.com/gantry-cri/gantry/plugin/operation"
	"github.com/gantry-cri/gantry/plugin/record"
	"github.com/gantry-cri/gantry/plugin/sandbox"
	"github.com/gantry-cri/gantry/plugin/stream"
)

func newStreaming(c config.Server, containers *container.Service, sandboxes *sandbox.Service, ops *operation.Table) (*stream.Server, error) {
	cfg := stream.Config{Address: c.StreamAddress, Port: strconv.Itoa(int(c.StreamPort)), IdleTimeout: c.StreamIdleTimeout}
	if c.StreamTLS.Enabled {
		t := c.StreamTLS
		cfg.TLS = &stream.TLS{
			CertFile: t.CertFile, KeyFile: t.KeyFile, ClientCAFile: t.ClientCAFile,
			MinVersion: t.MinVersion, CipherSuites: t.CipherSuites,
		}
	}
	return stream.New(cfg, sessions{containers, sandboxes, ops})
}

// sessions is stream.Runtime.
type sessions struct {
	containers *container.Service
	sandboxes  *sandbox.Service
	ops        *operation.Table
}

// begin enters a session into the operations table until done is called.
func (x sessions) begin(ctx context.Context, name, id string) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, Namespace))
	ctx, op := x.ops.Begin(ctx, operation.Info{Name: name, ID: id})
	return ctx, func() {
		op.End()
		cancel()
	}
}

func connection(s stream.Session) container.Connection {
	return container.Connection{Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, TTY: s.TTY}
}

// Exec implements stream.Runtime.
func (x sessions) Exec(ctx context.Context, s stream.Session) error {
	ctx, done := x.begin(ctx, "exec session", s.ContainerID)
	defer done()
	code, err := x.containers.Exec(ctx, s.ContainerID, s.Cmd, connection(s), sizes(ctx, s.Resize))
	if err != nil {
		return err
	}
	return stream.ExitStatus(int(code))
}

// Attach implements stream.Runtime.
func (x sessions) Attach(ctx context.Context, s stream.Session) error {
	ctx, done := x.begin(ctx, "attach session", s.ContainerID)
	defer done()
	return x.containers.Attach(ctx, s.ContainerID, connection(s), sizes(ctx, s.Resize))
}

// sizes translates terminal sizes until ctx ends.
func sizes(ctx context.Context, in <-chan stream.Size) <-chan [2]uint32 {
	if in == nil {
		return nil
	}
	out := make(chan [2]uint32)
	go func() {
		defer close(out)
		for {
			select {
			case size, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- [2]uint32{uint32(size.Width), uint32(size.Height)}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// PortForward implements stream.Runtime.
func (x sessions) PortForward(ctx context.Context, sandboxID string, port int32, conn io.ReadWriteCloser) error {
	ctx, done := x.begin(ctx, "port-forward session", sandboxID)
	defer done()
	sb, err := x.sandboxes.Get(sandboxID)
	if err != nil {
		return err
	}
	if sb.Phase != record.Ready {
		return fmt.Errorf("sandbox %s is %s: %w", sb.ID, sb.Phase, errdefs.ErrFailedPrecondition)
	}
	return stream.Forward(ctx, places(sb), port, conn)
}

// places are where a pod's ports are served: on its loopback, or else, when its
// runtime brings a network of its own, which the kernel's loopback does not lead
// into, at its addresses.
func places(sb record.Sandbox) []stream.Place {
	dialer := &net.Dialer{}
	if sb.HostNetwork() {
		return stream.Loopback(dialer.DialContext)
	}
	// The socket is made in the pod's network; what it carries may be moved from
	// anywhere.
	all := stream.Loopback(func(ctx context.Context, proto, addr string) (c net.Conn, err error) {
		err = network.Do(sb.Network.NetNS, func() error {
			c, err = dialer.DialContext(ctx, proto, addr)
			return err
		})
		return c, err
	})
	for _, ip := range sb.Network.IPs {
		all = append(all, stream.Place{IP: ip, Dial: dialer.DialContext})
	}
	return all
}
