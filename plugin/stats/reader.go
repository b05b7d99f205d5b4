package stats

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxFile bounds a file that is read, in bytes. The largest is a list of
// processes, of which a node has at most four million.
const maxFile = 32 << 20

// reader reads small files of the kernel, one after the other, into one buffer.
// After an error it reads no more. A directory "" is one of a hierarchy that the
// machine does not have: everything in it is unknown.
type reader struct {
	buf []byte
	err error
}

// number reads a file of one number.
func (r *reader) number(dir, name string) (c count) {
	r.parse(dir, name, func(b []byte) error {
		n, err := parseNumber(b)
		c = count{n, err == nil}
		return err
	})
	return c
}

// optional reads a file of one number that a kernel may not have.
func (r *reader) optional(dir, name string) count {
	return spare(r, func() count { return r.number(dir, name) })
}

// keys reads a file of keys.
func (r *reader) keys(dir, name string, wants ...want) {
	r.parse(dir, name, func(b []byte) error { return parseKeys(b, wants...) })
}

// pressure reads a pressure file, nil where the kernel keeps no such books: it
// may have been built or started without, or the cgroup may have them off.
func (r *reader) pressure(dir, name string) *cri.PsiStats {
	return spare(r, func() (p *cri.PsiStats) {
		r.parse(dir, name, func(b []byte) (err error) {
			p, err = parsePressure(b)
			return err
		})
		return p
	})
}

// spare reads something the kernel may not have.
func spare[T any](r *reader, read func() T) T {
	if r.err != nil {
		return *new(T)
	}
	v := read()
	if errors.Is(r.err, fs.ErrNotExist) || errors.Is(r.err, unix.EOPNOTSUPP) {
		r.err = nil
	}
	return v
}

func (r *reader) parse(dir, name string, parse func([]byte) error) {
	if r.err != nil || dir == "" {
		return
	}
	b, err := r.file(dir, name)
	if err == nil {
		err = parse(b)
	}
	if err != nil {
		r.err = fmt.Errorf("%s: %w", name, err)
	}
}

// file returns the whole file; the next call overwrites it. It is read by plain
// system calls: an os.File of a cgroup would be registered for polling, which
// costs as much as the reading.
func (r *reader) file(dir, name string) ([]byte, error) {
	fd, err := again(func() (int, error) {
		return unix.Open(dir+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	})
	if err != nil {
		return nil, gone(err)
	}
	defer unix.Close(fd)
	r.buf = r.buf[:0]
	for {
		r.buf = slices.Grow(r.buf, 512)
		n, err := again(func() (int, error) { return unix.Read(fd, r.buf[len(r.buf):cap(r.buf)]) })
		if err != nil {
			return nil, gone(err)
		}
		if n == 0 {
			return r.buf, nil
		}
		r.buf = r.buf[:len(r.buf)+n]
		if len(r.buf) > maxFile {
			return nil, fmt.Errorf("more than %d bytes: %w", maxFile, errdefs.ErrInternal)
		}
	}
}

// gone says of a cgroup that was removed while its file was open what is said
// of one that was removed before.
func gone(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return fs.ErrNotExist
	}
	return err
}

func again(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}
