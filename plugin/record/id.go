package record

import (
	"crypto/rand"
	"encoding/hex"
)

// NewID returns a fresh random ID of 64 hexadecimal digits, the form that
// tools around containerd expect.
func NewID() string {
	var b [32]byte
	rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// ValidID reports whether id has the form that NewID gives. Paths, cgroups and
// CNI container IDs are built from IDs, so nothing else may pass for one.
func ValidID(id string) bool {
	if len(id) != 64 {
		return false
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
