package crilog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// DirName is how the directory of a log is called that is beside its FIFOs.
const DirName = "journal"

// planFile is in the directory of a log: what Continue needs to know.
const planFile = "plan.json"

// plan says where the output goes.
type plan struct {
	Path    string
	Options Options
}

// Continue is Open for a process that was told nothing but the directory, and
// stands in for the one that opened the log: it goes on at the same path with the
// same options. NotFound means that there is no log, FailedPrecondition that
// another process has it open.
func Continue(dir string) (*Log, error) {
	data, err := os.ReadFile(filepath.Join(dir, planFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("continue log of %s: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("continue log: %w", err)
	}
	p, err := parsePlan(data)
	if err != nil {
		return nil, fmt.Errorf("continue log of %s: %w", dir, err)
	}
	return Open(dir, p.Path, p.Options)
}

func parsePlan(data []byte) (plan, error) {
	var p plan
	if err := json.Unmarshal(data, &p); err != nil {
		return plan{}, fmt.Errorf("read %s: %w: %w", planFile, errdefs.ErrDataLoss, err)
	}
	if p.Path == "" {
		return plan{}, fmt.Errorf("%s has no path: %w", planFile, errdefs.ErrDataLoss)
	}
	return p, nil
}

// save writes the plan, whole or not at all. It writes nothing when that is there
// already: a full tmpfs keeps no log from going on.
func (p plan) save(dir string) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	path, next := filepath.Join(dir, planFile), filepath.Join(dir, "."+planFile)
	if was, err := os.ReadFile(path); err == nil && bytes.Equal(was, data) {
		return nil
	}
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(next, path)
}
