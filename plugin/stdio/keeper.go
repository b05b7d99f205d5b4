package stdio

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"
)

// Keeper holds files open while no daemon does. A FIFO that nobody has open
// forgets what is in it, and the shim closes its side when a container ends.
type Keeper interface {
	// Keep holds files under a name until Drop. The files held under that name
	// before are let go.
	Keep(ctx context.Context, name string, files []*os.File) error
	// Drop lets go of the files of a name. It tolerates absence.
	Drop(ctx context.Context, name string) error
}

// keep gives readers of the FIFOs to a keeper. Readers only: they change
// nothing about when an end of output is seen.
func keep(ctx context.Context, k Keeper, name string, fifos []string) error {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, path := range fifos {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	return k.Keep(ctx, name, files)
}

// The protocol of a keeper process: one SOCK_SEQPACKET connection per call, one
// packet each way. The files come with the request.
const (
	keeperPacket  = 8 << 10
	keeperFiles   = 4
	keeperTimeout = 5 * time.Second
)

type keeperRequest struct {
	Keep string `json:"keep,omitempty"`
	Drop string `json:"drop,omitempty"`
}

type keeperReply struct {
	Error string `json:"error,omitempty"`
}

// RemoteKeeper is a Keeper in another process, see ServeKeeper.
type RemoteKeeper struct{ path string }

// NewRemoteKeeper returns the keeper that listens at path.
func NewRemoteKeeper(path string) *RemoteKeeper { return &RemoteKeeper{path: path} }

// Keep implements Keeper.
func (k *RemoteKeeper) Keep(ctx context.Context, name string, files []*os.File) error {
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	if err := k.call(ctx, keeperRequest{Keep: name}, unix.UnixRights(fds...)); err != nil {
		return fmt.Errorf("keep files of %s: %w", name, err)
	}
	return nil
}

// Drop implements Keeper. A keeper that does not run holds nothing.
func (k *RemoteKeeper) Drop(ctx context.Context, name string) error {
	err := k.call(ctx, keeperRequest{Drop: name}, nil)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("drop files of %s: %w", name, err)
	}
	return nil
}

func (k *RemoteKeeper) call(ctx context.Context, r keeperRequest, rights []byte) error {
	ctx, cancel := context.WithTimeout(ctx, keeperTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", k.path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	c := conn.(*net.UnixConn)
	if _, _, err := c.WriteMsgUnix(body, rights, nil); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	b := make([]byte, keeperPacket)
	n, err := c.Read(b)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	var reply keeperReply
	if err := json.Unmarshal(b[:n], &reply); err != nil {
		return fmt.Errorf("decode reply: %w: %w", err, errdefs.ErrUnavailable)
	}
	if reply.Error != "" {
		return fmt.Errorf("%s: %w", reply.Error, errdefs.ErrInternal)
	}
	return nil
}

// ServeKeeper is the other side of RemoteKeeper, for a process that outlives
// the daemon. l is a unixpacket listener, which it closes. It returns when ctx
// ends or l fails, with all files let go.
func ServeKeeper(ctx context.Context, l *net.UnixListener) error {
	s := &keeperServer{held: map[string][]int{}}
	defer s.dropAll()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve keeper: %w", err)
		}
		// One at a time: a call is two packets, and it has a deadline.
		s.serve(c)
		c.Close()
	}
}

// keeperServer is for one goroutine.
type keeperServer struct{ held map[string][]int }

func (s *keeperServer) serve(c *net.UnixConn) {
	if err := c.SetDeadline(time.Now().Add(keeperTimeout)); err != nil {
		return
	}
	body, oob := make([]byte, keeperPacket), make([]byte, unix.CmsgSpace(4*keeperFiles))
	n, oobn, _, _, err := c.ReadMsgUnix(body, oob)
	if err != nil {
		return
	}
	fds, err := received(oob[:oobn])
	if err == nil {
		err = s.do(body[:n], fds)
	}
	if err != nil {
		closeAll(fds)
	}
	var reply keeperReply
	if err != nil {
		reply.Error = err.Error()
	}
	if b, err := json.Marshal(reply); err == nil {
		_, _ = c.Write(b) // a caller that left learns nothing, and needs nothing
	}
}

// do takes over fds unless it fails.
func (s *keeperServer) do(body []byte, fds []int) error {
	r, err := decodeKeeperRequest(body)
	if err != nil {
		return err
	}
	name := r.Keep + r.Drop
	closeAll(s.held[name])
	delete(s.held, name)
	if r.Keep != "" {
		s.held[name] = fds
		return nil
	}
	closeAll(fds)
	return nil
}

func decodeKeeperRequest(body []byte) (keeperRequest, error) {
	var r keeperRequest
	if err := json.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("decode request: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if (r.Keep == "") == (r.Drop == "") {
		return r, fmt.Errorf("request is neither keep nor drop: %w", errdefs.ErrInvalidArgument)
	}
	return r, nil
}

func (s *keeperServer) dropAll() {
	for _, fds := range s.held {
		closeAll(fds)
	}
	clear(s.held)
}

// received returns the files that came with a packet.
func received(oob []byte) ([]int, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var fds []int
	var errs []error
	for i := range msgs {
		got, err := unix.ParseUnixRights(&msgs[i])
		errs = append(errs, err)
		for _, fd := range got {
			unix.CloseOnExec(fd)
		}
		fds = append(fds, got...)
	}
	return fds, errors.Join(errs...)
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
