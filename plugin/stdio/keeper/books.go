package keeper

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/log"
)

const (
	// young is the age at which the end of a keeper is a failure of its start.
	young = time.Second
	// attempts bounds how often a keeper may end just when it is spoken to.
	attempts = 3
)

// errYoung is of a keeper that ends again and again.
var errYoung = errors.New("the keeper ended just after its start")

// books is what should be held, and the connection over which that is brought
// about. It is for one goroutine.
type books struct {
	*Keeper

	want map[string][]string // FIFOs by name; none is a name to be dropped
	news map[string]bool     // names of which the keeper was not told

	session *session         // nil when there is none
	again   <-chan time.Time // set while a keeper that failed is left alone
	err     error            // why
}

func (b *books) set(name string, fifos []string) {
	b.want[name], b.news[name] = fifos, true
}

// settle tells the keeper all news. The error is about the name, or about the
// keeper; what is wrong with other names is logged.
func (b *books) settle(ctx context.Context, name string) error {
	defer b.rest()
	var err error
	for range attempts {
		if err = b.begin(ctx); err != nil {
			return err
		}
		if b.session == nil {
			return nil
		}
		if err = b.tell(ctx, name); !broken(err) {
			return err
		}
		if errors.Is(err, errSilent) {
			break
		}
		b.hangUp()
	}
	return b.postpone(err)
}

func broken(err error) bool { return errors.Is(err, errGone) || errors.Is(err, errSilent) }

// begin sees to it that there is a session. There is none if no keeper runs and
// nothing is to be held.
func (b *books) begin(ctx context.Context) error {
	if b.session != nil {
		return nil
	}
	if b.again != nil {
		return b.err
	}
	conn, err := dial(ctx, b.socket)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		b.forgetDropped() // nobody holds anything
		if len(b.want) == 0 {
			return nil
		}
		conn, err = start(ctx, b.program, b.socket)
	}
	if err != nil {
		return b.postpone(err)
	}
	b.session = newSession(conn, b.patience)
	return nil
}

// forgetDropped is for when there is no keeper to be told.
func (b *books) forgetDropped() {
	for name, fifos := range b.want {
		if len(fifos) == 0 {
			delete(b.want, name)
			delete(b.news, name)
		}
	}
}

// tell returns the error of the name, or one that broke the session.
func (b *books) tell(ctx context.Context, name string) (mine error) {
	for n := range b.news {
		err := b.tellOne(n)
		if broken(err) {
			return err
		}
		delete(b.news, n)
		switch {
		case n == name:
			mine = err
		case err != nil:
			log.G(ctx).WithError(err).WithField("name", n).Warn("output is not kept while the daemon is away")
		}
	}
	return mine
}

func (b *books) tellOne(name string) error {
	if fifos := b.want[name]; len(fifos) > 0 {
		return b.session.keep(name, fifos)
	}
	err := b.session.drop(name)
	if err == nil {
		delete(b.want, name)
	}
	return err
}

// hangUp ends the session. The next one is told everything.
func (b *books) hangUp() {
	if b.session == nil {
		return
	}
	b.session.close()
	b.session = nil
	for name := range b.want {
		b.news[name] = true
	}
}

// rest hangs up when nothing is to be held: the keeper may end then.
func (b *books) rest() {
	if len(b.want) == 0 {
		b.hangUp()
	}
}

// lost is readable when the session is over without our doing.
func (b *books) lost() <-chan []byte {
	if b.session == nil {
		return nil
	}
	return b.session.replies
}

// replace gets another keeper for one that ended.
func (b *books) replace(ctx context.Context) {
	age := time.Since(b.session.since)
	b.hangUp()
	if age < young {
		b.again, b.err = time.After(young), errYoung
		return
	}
	log.G(ctx).Warn("the keeper of container output has ended: starting another one")
	b.catchUp(ctx)
}

// catchUp tries again what failed before.
func (b *books) catchUp(ctx context.Context) {
	if err := b.settle(ctx, ""); err != nil {
		log.G(ctx).WithError(err).Warnf("container output is not kept for %s", b.pause)
	}
}

// postpone leaves the keeper alone for a while, and returns the reason.
func (b *books) postpone(err error) error {
	b.hangUp()
	b.again, b.err = time.After(b.pause), err
	return err
}

// sweep drops what the keeper holds under names that are not known.
func (b *books) sweep(ctx context.Context, known func(name string) bool) error {
	defer b.rest()
	if err := b.begin(ctx); err != nil || b.session == nil {
		return err
	}
	for n := 0; ; {
		name, there, err := b.session.name(n)
		if err == nil && there && !known(name) && len(b.want[name]) == 0 {
			// The last name takes its place.
			log.G(ctx).WithField("name", name).Info("dropping output that was kept for nobody")
			err = b.session.drop(name)
			n--
		}
		if broken(err) {
			return b.postpone(err)
		}
		if err != nil || !there {
			return err
		}
		n++
	}
}
