// Package artifact lays the blobs of OCI artifacts out as files, in snapshots
// that volumes are then mounted from. Nothing is copied where that can be
// avoided: a file is one more name of the blob in the content store. So it is
// there as long as the snapshot is, whatever becomes of the blob.
//
// What the files are called has been settled by the caller; the package reads no
// manifest and knows no snapshotter. Start at Writer.Write.
package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const (
	// dirMode and fileMode are for everybody to read, as the volume is read-only
	// and belongs to whoever may mount it.
	dirMode  = 0o755
	fileMode = 0o444
	// chunk is how much is copied between two looks at the context.
	chunk = 64 << 20
)

// Options are what a Writer works with.
type Options struct {
	// Content has the blobs.
	Content content.Provider
	// BlobRoot is the directory with the blobs of a local content store, "" for
	// none.
	BlobRoot string
	// Copy has every file copied: blobs that share an inode with a file share its
	// security label.
	Copy bool
	// Sync makes the files durable before Write returns.
	Sync bool
}

// Writer writes files.
type Writer struct{ o Options }

// New returns a writer.
func New(o Options) *Writer { return &Writer{o} }

// Write makes files in the empty filesystem that root mounts. done is told how
// many bytes of them are there.
func (w *Writer) Write(ctx context.Context, root []mount.Mount, files []facts.File, done func(int64)) error {
	return withRoot(ctx, root, func(dir string) error {
		sum := int64(0)
		for _, f := range files {
			if err := w.file(ctx, dir, f, func(n int64) { done(sum + n) }); err != nil {
				return fmt.Errorf("%s: %w", f.Name, err)
			}
			sum += f.Size
			done(sum)
		}
		if w.o.Sync {
			return syncFS(dir)
		}
		return nil
	})
}

// withRoot calls fn with the directory that the mounts show. That of a bind mount
// is its source: through a mount of it no file could be linked.
func withRoot(ctx context.Context, mounts []mount.Mount, fn func(dir string) error) error {
	if len(mounts) == 1 && mounts[0].Type == "bind" {
		return fn(mounts[0].Source)
	}
	var failure error // without the path of the mount in its words
	err := mount.WithTempMount(ctx, mounts, func(dir string) error {
		failure = fn(dir)
		return nil
	})
	return errors.Join(failure, err)
}

// file makes one file. Nobody else writes below dir, and no link is made there.
func (w *Writer) file(ctx context.Context, dir string, f facts.File, done func(int64)) error {
	if err := makeDirs(dir, path.Dir(f.Name)); err != nil {
		return err
	}
	target := filepath.Join(dir, f.Name)
	if !w.o.Copy && f.Size > 0 {
		if blob := w.blob(f); blob != "" && os.Link(blob, target) == nil {
			return nil
		}
		// On another filesystem, or it has all the names it can have.
	}
	return w.copy(ctx, f, target, done)
}

// makeDirs makes what is missing of a path below dir.
func makeDirs(dir, name string) error {
	if name == "." {
		return nil
	}
	if err := makeDirs(dir, path.Dir(name)); err != nil {
		return err
	}
	made := filepath.Join(dir, name)
	err := os.Mkdir(made, dirMode)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod(made, dirMode) // whatever the umask
}

// blob is the path of a file's content, "" if it is in no file that is as it
// should be.
func (w *Writer) blob(f facts.File) string {
	if w.o.BlobRoot == "" || f.Digest.Validate() != nil {
		return ""
	}
	p := filepath.Join(w.o.BlobRoot, "blobs", f.Digest.Algorithm().String(), f.Digest.Encoded())
	fi, err := os.Lstat(p)
	if err != nil || fi.Mode() != fileMode || fi.Size() != f.Size {
		return ""
	}
	return p
}

// copy copies the content; a filesystem that can share it does.
func (w *Writer) copy(ctx context.Context, f facts.File, target string, done func(int64)) (err error) {
	var from io.ReadCloser
	if f.Size > 0 { // an empty file has no blob
		if from, err = w.open(ctx, f); err != nil {
			return err
		}
		defer from.Close()
	}
	to, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	if err := to.Chmod(fileMode); err != nil {
		return err
	}
	for n := int64(0); n < f.Size; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		copied, err := io.CopyN(to, from, min(chunk, f.Size-n))
		if err != nil {
			return fmt.Errorf("copy blob %s: %w", f.Digest, err)
		}
		n += copied
		done(n)
	}
	return nil
}

func (w *Writer) open(ctx context.Context, f facts.File) (io.ReadCloser, error) {
	if p := w.blob(f); p != "" {
		return os.Open(p)
	}
	ra, err := w.o.Content.ReaderAt(ctx, imagespec.Descriptor{Digest: f.Digest, Size: f.Size})
	if err != nil {
		return nil, fmt.Errorf("open blob: %w", err)
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(ra), ra}, nil
}

// syncFS writes out what the filesystem of dir has in memory.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
}
