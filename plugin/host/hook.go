package host

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// maxHooks bounds the files of hooks directories.
const maxHooks = 1024

// File is a file that was read.
type File struct {
	Path    string
	Content []byte
}

// ReadHooks reads the files *.json of the hooks directories, in the order in
// which their hooks are to run: by name in lower case. A file in a later
// directory replaces one of the same name; a directory that does not exist has
// none.
func ReadHooks(dirs []string) ([]File, error) {
	byName := map[string]string{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			return nil, fmt.Errorf("read hooks: %w", classed(err))
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".json") {
				byName[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	if len(byName) > maxHooks {
		return nil, fmt.Errorf("read hooks: more than %d files: %w", maxHooks, errdefs.ErrFailedPrecondition)
	}
	var files []File
	for name, path := range byName {
		content, err := readRegular(path)
		if err != nil {
			return nil, fmt.Errorf("read hook %s: %w", name, err)
		}
		files = append(files, File{Path: path, Content: content})
	}
	slices.SortFunc(files, func(a, b File) int {
		left, right := filepath.Base(a.Path), filepath.Base(b.Path)
		return cmp.Or(cmp.Compare(strings.ToLower(left), strings.ToLower(right)), cmp.Compare(left, right))
	})
	return files, nil
}
