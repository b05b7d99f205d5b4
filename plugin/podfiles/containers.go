package podfiles

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gantry-cri/gantry/plugin/record"
)

// containerDir is where the files of one container are, among its pod's.
func (f *Files) containerDir(c record.Container) string {
	return filepath.Join(f.root, c.SandboxID, "containers", c.ID)
}

// WriteContainer makes a file that one container alone sees, with the label of
// its files, and returns its path. RemoveContainer takes it away.
func (f *Files) WriteContainer(c record.Container, name string, content []byte, label string) (string, error) {
	dir := f.containerDir(c)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", fmt.Errorf("create directory of container files: %w", err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return "", fmt.Errorf("write container file: %w", err)
	}
	if err := os.Chmod(path, 0o644); err != nil { // whatever the umask
		return "", fmt.Errorf("set mode of container file: %w", err)
	}
	if f.text.Label == nil || label == "" {
		return path, nil
	}
	return path, f.text.Label(label, path)
}

// RemoveContainer takes away what WriteContainer made; nothing is fine.
func (f *Files) RemoveContainer(_ context.Context, c record.Container) error {
	if err := os.RemoveAll(f.containerDir(c)); err != nil {
		return fmt.Errorf("remove container files: %w", err)
	}
	return nil
}
