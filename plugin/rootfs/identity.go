package rootfs

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// MaxID is the largest user or group number a container may have. Kubernetes
// draws the line there too, and beyond it numbers turn negative or become
// "no change" in some system calls.
const MaxID = 1<<31 - 1

// maxName bounds a user or group name; useradd stops at 32.
const maxName = 256

// Identity is one half of an image's USER: a number or a name, never both.
// The zero value says that nothing was given.
type Identity struct {
	// ID is nil when Name is to be looked up.
	ID   *uint32
	Name string
}

// Zero reports whether nothing was given.
func (i Identity) Zero() bool { return i.ID == nil && i.Name == "" }

// ParseIdentity reads a user or a group as an image's USER writes it.
//
// What looks like a number is that number or an error. It never becomes a name
// that the image's own passwd could map to root: not 2^32, not "00", not
// "1e3". Whoever reports an image's user must use this function, so that the
// kubelet's decision about root and the process agree.
func ParseIdentity(s string) (Identity, error) {
	if s == "" {
		return Identity{}, nil
	}
	if isDigits(s) {
		id, err := parseID(s)
		if err != nil {
			return Identity{}, err
		}
		return Identity{ID: &id}, nil
	}
	if numericLooking(s) {
		return Identity{}, fmt.Errorf("%q looks like a number but is not a plain decimal one: %w", s, errdefs.ErrInvalidArgument)
	}
	if err := checkName(s); err != nil {
		return Identity{}, err
	}
	return Identity{Name: s}, nil
}

// ParseUser splits an image's USER, "user" or "user:group".
func ParseUser(s string) (user, group Identity, err error) {
	u, g, hasGroup := strings.Cut(s, ":")
	if hasGroup && u == "" {
		return Identity{}, Identity{}, fmt.Errorf("%q: group without user: %w", s, errdefs.ErrInvalidArgument)
	}
	if user, err = ParseIdentity(u); err != nil {
		return Identity{}, Identity{}, err
	}
	if group, err = ParseIdentity(g); err != nil {
		return Identity{}, Identity{}, err
	}
	return user, group, nil
}

// parseID reads a canonical decimal number up to MaxID.
func parseID(s string) (uint32, error) {
	if len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("%q has leading zeros: %w", s, errdefs.ErrInvalidArgument)
	}
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number from 0 to %d: %w", s, MaxID, errdefs.ErrInvalidArgument)
	}
	return uint32(n), nil
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// numericLooking reports whether some reader could take s for a number: a
// sign, another base, a fraction, an exponent, digit groups.
func numericLooking(s string) bool {
	if !strings.ContainsRune("0123456789+-.", rune(s[0])) {
		return false
	}
	// A number that is out of range is still a number.
	looks := func(err error) bool { return err == nil || errors.Is(err, strconv.ErrRange) }
	_, floatErr := strconv.ParseFloat(s, 64)
	_, intErr := strconv.ParseInt(s, 0, 64)
	return looks(floatErr) || looks(intErr)
}

func checkName(s string) error {
	if len(s) > maxName {
		return fmt.Errorf("name of %d bytes is longer than %d: %w", len(s), maxName, errdefs.ErrInvalidArgument)
	}
	if s[0] == '-' || s[0] == '+' {
		return fmt.Errorf("name %q begins with %q: %w", s, s[0], errdefs.ErrInvalidArgument)
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == 0x7f || strings.IndexByte(":,/", c) >= 0 {
			return fmt.Errorf("name %q has the byte %q: %w", s, c, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
