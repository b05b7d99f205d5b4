package rootfs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	passwdFile = "/etc/passwd"
	groupFile  = "/etc/group"

	// maxDatabase and maxLine bound what is read of an image's passwd and
	// group; both are far above what real ones hold.
	maxDatabase = 8 << 20
	maxLine     = 64 << 10
)

// account is a line of passwd that matched.
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// group is a line of group. The byte slices are only valid during the visit.
type group struct {
	name, id, members []byte
}

// passwdEntry finds the first line of passwd that fits, by name or by number.
// found is false if there is none or no file.
func passwdEntry(root *os.File, want Identity) (acc account, found bool, err error) {
	err = readLines(root, passwdFile, func(line []byte) (bool, error) {
		acc, found, err = matchPasswd(line, want)
		return !found, err
	})
	return acc, found, err
}

// matchPasswd compares one line of passwd. A line that cannot be read is
// skipped unless it is the one asked for by name.
func matchPasswd(line []byte, want Identity) (account, bool, error) {
	f := bytes.SplitN(line, []byte(":"), 7)
	if len(f) < 4 {
		return account{}, false, nil
	}
	uid, uidErr := parseID(string(f[2]))
	gid, gidErr := parseID(string(f[3]))
	switch {
	case want.ID == nil && string(f[0]) != want.Name:
		return account{}, false, nil
	case want.ID != nil && (uidErr != nil || uid != *want.ID):
		return account{}, false, nil
	}
	if err := errors.Join(uidErr, gidErr); err != nil {
		return account{}, false, fmt.Errorf("entry of user %q: %w", f[0], err)
	}
	acc := account{name: string(f[0]), uid: uid, gid: gid}
	if len(f) > 5 {
		acc.home = string(f[5])
	}
	return acc, true, nil
}

// groupID finds the number of a named group.
func groupID(root *os.File, name string) (id uint32, err error) {
	found := false
	err = readGroups(root, func(g group) (bool, error) {
		if string(g.name) != name {
			return true, nil
		}
		found = true
		id, err = parseID(string(g.id))
		return false, err
	})
	if err == nil && !found {
		err = fmt.Errorf("no group %q in the image's %s: %w", name, groupFile, errdefs.ErrNotFound)
	}
	return id, err
}

// memberships lists the numbers of all groups that name a user as a member.
func memberships(root *os.File, user string) (ids []uint32, err error) {
	err = readGroups(root, func(g group) (bool, error) {
		if !hasMember(g.members, user) {
			return true, nil
		}
		id, err := parseID(string(g.id))
		if err != nil {
			return false, fmt.Errorf("group %q: %w", g.name, err)
		}
		ids = append(ids, id)
		return true, nil
	})
	return ids, err
}

func hasMember(members []byte, user string) bool {
	for m := range bytes.SplitSeq(members, []byte(",")) {
		if string(m) == user {
			return true
		}
	}
	return false
}

func readGroups(root *os.File, visit func(group) (more bool, err error)) error {
	return readLines(root, groupFile, func(line []byte) (bool, error) {
		f := bytes.SplitN(line, []byte(":"), 4)
		if len(f) < 4 {
			return true, nil
		}
		return visit(group{name: f[0], id: f[2], members: f[3]})
	})
}

// readLines visits the lines of a file of the image until visit wants no more.
// A file that does not exist has no lines.
func readLines(root *os.File, name string, visit func(line []byte) (more bool, err error)) error {
	f, err := openRegular(root, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := scan(f, visit); err != nil {
		return fmt.Errorf("read %s of the image: %w", name, err)
	}
	return nil
}

// scan is readLines without the file; comments and empty lines are left out.
func scan(r io.Reader, visit func(line []byte) (more bool, err error)) error {
	limited := &io.LimitedReader{R: r, N: maxDatabase + 1}
	s := bufio.NewScanner(limited)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		if limited.N <= 0 {
			return fmt.Errorf("longer than %d bytes: %w", maxDatabase, errdefs.ErrFailedPrecondition)
		}
		line := s.Bytes()
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if more, err := visit(line); !more || err != nil {
			return err
		}
	}
	if errors.Is(s.Err(), bufio.ErrTooLong) {
		return fmt.Errorf("a line is longer than %d bytes: %w", maxLine, errdefs.ErrFailedPrecondition)
	}
	return s.Err()
}

// checkHome refuses a home directory that could break a line or an
// environment.
func checkHome(home string) error {
	if strings.ContainsAny(home, "\n\r\x00") {
		return fmt.Errorf("home directory %q has a line break or a NUL byte: %w", home, errdefs.ErrInvalidArgument)
	}
	return nil
}
