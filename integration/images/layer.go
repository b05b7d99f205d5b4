package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	architecture = runtime.GOARCH
	busybox      = "/bin/busybox"
)

// File is one entry of a layer. The zero type is a regular file; parents are
// not made: list them, or rely on the base.
type File struct {
	Path string
	Data []byte
	// Mode, Type and the rest are those of the tar header. A Mode of 0 becomes
	// 0755 for directories and 0644 for anything else.
	Mode         int64
	Type         byte
	Link         string
	UID, GID     int
	Major, Minor int64
	PAX          map[string]string
}

// Dir is a directory of root's.
func Dir(path string, mode int64) File { return File{Path: path, Type: tar.TypeDir, Mode: mode} }

// Text is a regular file of root's.
func Text(path, text string) File { return File{Path: path, Data: []byte(text)} }

// Executable is a regular file that anybody may run.
func Executable(path string, data []byte) File { return File{Path: path, Data: data, Mode: 0o755} }

// Symlink points from path to target.
func Symlink(path, target string) File { return File{Path: path, Type: tar.TypeSymlink, Link: target} }

// Hardlink is a second name of the file at target, of this layer or a lower one.
func Hardlink(path, target string) File { return File{Path: path, Type: tar.TypeLink, Link: target} }

// Whiteout removes the file of that name in lower layers.
func Whiteout(path string) File {
	at := strings.LastIndexByte(path, '/') + 1
	return File{Path: path[:at] + ".wh." + path[at:]}
}

// Opaque hides what lower layers have in a directory.
func Opaque(dir string) File { return File{Path: strings.TrimSuffix(dir, "/") + "/.wh..wh..opq"} }

func (f File) header() *tar.Header {
	h := &tar.Header{
		Name:       strings.TrimPrefix(f.Path, "/"),
		Typeflag:   f.Type,
		Linkname:   f.Link,
		Size:       int64(len(f.Data)),
		Mode:       f.Mode,
		Uid:        f.UID,
		Gid:        f.GID,
		Devmajor:   f.Major,
		Devminor:   f.Minor,
		ModTime:    Epoch,
		PAXRecords: f.PAX,
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
	}
	if h.Typeflag == tar.TypeLink {
		h.Linkname = strings.TrimPrefix(f.Link, "/")
	}
	if h.Typeflag == tar.TypeDir {
		h.Name = strings.TrimSuffix(h.Name, "/") + "/"
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	return h
}

// Tar writes the files as one uncompressed layer.
func Tar(files []File) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if err := w.WriteHeader(f.header()); err != nil {
			return nil, fmt.Errorf("write %s: %w", f.Path, err)
		}
		if _, err := w.Write(f.Data); err != nil {
			return nil, fmt.Errorf("write %s: %w", f.Path, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return b.Bytes(), nil
}

// Layer makes a layer of the files, compressed as usual.
func Layer(files []File) (v1.Layer, error) {
	data, err := Tar(files)
	if err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
}

// baseFiles are busybox under the names of all its applets, the accounts, and
// the directories that every container expects.
func baseFiles() ([]File, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, fmt.Errorf("read busybox (the package busybox-static has it): %w", err)
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list applets: %w", err)
	}
	files := []File{
		Dir("bin", 0o755), Dir("etc", 0o755), Dir("home", 0o755), Dir("proc", 0o555), Dir("root", 0o700),
		Dir("run", 0o755), Dir("sys", 0o555), Dir("tmp", 0o1777), Dir("usr", 0o755), Dir("var", 0o755),
		Dir("dev", 0o755), Dir("www", 0o755),
		{Path: "home/" + Alice, Type: tar.TypeDir, Mode: 0o700, UID: AliceUID, GID: AliceUID},
		{Path: "home/" + Bob, Type: tar.TypeDir, Mode: 0o700, UID: BobUID, GID: BobUID},
		Symlink("sbin", "bin"), Symlink("usr/bin", "../bin"), Symlink("usr/sbin", "../bin"),
		Text("etc/passwd", passwd), Text("etc/group", group),
		Text("www/index.html", "hello from the pod\n"),
		Executable("bin/busybox", program),
	}
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			files = append(files, Symlink("bin/"+a, "busybox"))
		}
	}
	return files, nil
}
