package stdio

import (
	"context"
	"fmt"
	"io"
)

// Streams are the ends of a client; a nil one is not wanted.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// Attach connects a client until the output of the container ends, the client
// cannot be written to or takes nothing while its backlog is full, or ctx ends.
// What does not fit into the backlog of a slow client is left out, and the error
// at the end, DataLoss, says how much. Without outputs it lasts as long as the
// input. Output from before is not repeated. Input that several clients bring is
// mixed; with a terminal there is no stderr.
//
// A Read or Write of the client that is under way when Attach returns is not
// waited for: the caller closes the client's connection, which ends it.
func (o *IO) Attach(ctx context.Context, s Streams) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(context.Canceled)
	if o.cfg.Terminal {
		s.Stderr = nil
	}
	c := o.hub.join(s, backlog{limit: o.cfg.AttachBuffer, stall: o.cfg.AttachStall})
	defer o.hub.leave(c)

	fed := make(chan error, 1)
	if s.Stdin != nil {
		go func() { fed <- o.feed(ctx, s.Stdin) }()
		defer o.inputEnded(ctx)
	}
	if s.Stdout == nil && s.Stderr == nil {
		select {
		case err := <-fed:
			return err
		case <-o.drained:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("attach: %w", context.Cause(ctx))
		}
	}
	delivered := make(chan error, 1)
	go func() { delivered <- c.deliver() }()
	for {
		select {
		case err := <-delivered:
			if err != nil {
				return fmt.Errorf("attach: %w", err)
			}
			return nil
		case <-c.gone:
			return fmt.Errorf("attach: %w", c.cause())
		case <-fed:
			// Output goes on, and its end or failure is what counts.
			o.inputEnded(ctx)
		case <-ctx.Done():
			return fmt.Errorf("attach: %w", context.Cause(ctx))
		}
	}
}

// feed copies the input of a client until it ends. What the container does not
// want is thrown away, so that the connection goes on being read.
func (o *IO) feed(ctx context.Context, r io.Reader) error {
	if o.stdin == nil {
		_, err := io.Copy(io.Discard, r)
		return err
	}
	return o.stdin.feed(ctx, r, o.cfg.StdinOnce)
}

// inputEnded is where stdin once takes effect.
func (o *IO) inputEnded(ctx context.Context) {
	if o.stdin != nil && o.cfg.StdinOnce {
		o.stdin.finish(ctx)
	}
}
