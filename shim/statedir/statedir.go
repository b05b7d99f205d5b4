// Package statedir is the directories in which a supervisor keeps what it knows of
// tasks and of sandboxes: one for each, with a record in it. They do not outlive a
// reboot, so nothing is synced. What is in their bundles of it is here too.
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

// addressFile is in the bundle of every task and sandbox.
const addressFile = "address"

// WriteAddress writes into a bundle where its supervisor listens: by that the
// shim's delete finds the records.
func WriteAddress(bundle, address string) error {
	return os.WriteFile(filepath.Join(bundle, addressFile), []byte(address), 0o600)
}

// ReadAddress returns what WriteAddress wrote; os.ErrNotExist if it did not.
func ReadAddress(bundle string) (string, error) {
	data, err := os.ReadFile(filepath.Join(bundle, addressFile))
	return string(data), err
}
