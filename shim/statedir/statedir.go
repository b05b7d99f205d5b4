// Package statedir is the directories in which a supervisor keeps what it knows of
// tasks and of sandboxes: one for each, with a record in it. They do not outlive a
// reboot, so nothing is synced.
package statedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

const recordFile = "record.json"

// DirOf is the directory of a task or sandbox below parent.
func DirOf(parent, id string) (string, error) {
	if id == "" || strings.HasPrefix(id, ".") || filepath.Base(id) != id {
		return "", fmt.Errorf("id %q is no name of a directory: %w", id, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(parent, id), nil
}

// Read returns the record in the directory; NotFound without one, DataLoss for
// one that cannot be understood.
func Read[T any](dir string) (record T, err error) {
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if errors.Is(err, os.ErrNotExist) {
		return record, fmt.Errorf("record of %s: %w", filepath.Base(dir), errdefs.ErrNotFound)
	}
	if err != nil {
		return record, err
	}
	if err := json.Unmarshal(data, &record); err != nil {
		return record, fmt.Errorf("read %s: %w: %w", recordFile, errdefs.ErrDataLoss, err)
	}
	return record, nil
}

// Write puts the record into the directory, whole or not at all.
func Write(dir string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	next := filepath.Join(dir, "."+recordFile)
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return os.Rename(next, filepath.Join(dir, recordFile))
}
