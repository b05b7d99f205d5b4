package cdi

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settled is how old a change must be to be told from a later one by its time:
// some file systems keep seconds.
const settled = 2 * time.Second

// state describes the files of the directories so that any change of one
// changes it, and tells when the last change was. What cannot be looked at is
// part of the state too.
func state(dirs []string) (text string, newest time.Time) {
	var b strings.Builder
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		fmt.Fprintf(&b, "%s %v\n", dir, err)
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); ext != ".json" && ext != ".yaml" {
				continue
			}
			var st unix.Stat_t // of the file that a link points to
			err := unix.Stat(filepath.Join(dir, e.Name()), &st)
			changed := time.Unix(st.Ctim.Unix())
			if changed.After(newest) {
				newest = changed
			}
			fmt.Fprintf(&b, "%q %d:%d %d %d %v\n", e.Name(), st.Dev, st.Ino, st.Size, changed.UnixNano(), err)
		}
	}
	return b.String(), newest
}
