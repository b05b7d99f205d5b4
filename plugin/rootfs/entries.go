package rootfs

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/gantry-cri/gantry/plugin/facts"
)

// maxCopied bounds a database that entries are added to; a larger one is left
// as it is.
const maxCopied = 1 << 20

// Databases are an image's passwd and group, each nil where it needs nothing.
type Databases struct{ Passwd, Group []byte }

// WithEntries returns the image's databases with an entry each for a user and
// its group that they do not know, so that tools find a name: the number. An
// image without a database gets none, and nothing of a request but numbers
// comes into them (CVE-2022-4318).
func WithEntries(root *os.File, u facts.User) (Databases, error) {
	if u.Name != "" {
		return Databases{}, nil
	}
	var d Databases
	_, known, err := passwdEntry(root, Identity{ID: &u.UID})
	if err == nil && !known {
		d.Passwd, err = appended(root, passwdFile, fmt.Sprintf("%d:x:%d:%d::/:/sbin/nologin\n", u.UID, u.UID, u.GID))
	}
	if err != nil {
		return Databases{}, fmt.Errorf("add entry of user %d: %w", u.UID, err)
	}
	known, err = groupKnown(root, u.GID)
	if err == nil && !known {
		d.Group, err = appended(root, groupFile, fmt.Sprintf("%d:x:%d:\n", u.GID, u.GID))
	}
	if err != nil {
		return Databases{}, fmt.Errorf("add entry of group %d: %w", u.GID, err)
	}
	return d, nil
}

func groupKnown(root *os.File, gid uint32) (known bool, err error) {
	want := []byte(strconv.FormatUint(uint64(gid), 10))
	err = readGroups(root, func(g group) (bool, error) {
		known = bytes.Equal(g.id, want)
		return !known, nil
	})
	return known, err
}

// appended is the content of a file of the image with a line more, nil for a
// file that is not there or too large.
func appended(root *os.File, name, line string) ([]byte, error) {
	f, err := openRegular(root, name)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxCopied+1))
	if err != nil {
		return nil, classed(err)
	}
	if len(content) > maxCopied {
		return nil, nil
	}
	if len(content) > 0 && content[len(content)-1] != '\n' {
		content = append(content, '\n')
	}
	return append(content, line...), nil
}
