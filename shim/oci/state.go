package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/go-runc"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/plugin/cgrouptree"
)

// stateName is the file in which runc writes down what it has made.
const stateName = "state.json"

// state is what is read of it.
type state struct {
	ID        string `json:"id"`
	Pid       int    `json:"init_process_pid"`
	StartTime uint64 `json:"init_process_start"`
	Rootless  bool   `json:"rootless"`
	// CgroupPaths are by controller, "" is the unified hierarchy.
	CgroupPaths  map[string]string `json:"cgroup_paths"`
	IntelRdtPath string            `json:"intel_rdt_path"`
	IntelRdtMon  string            `json:"intel_rdt_mon_path"`
	Config       *stateConfig      `json:"config"`
}

type stateConfig struct {
	Cgroups         *cgroups.Cgroup `json:"cgroups"`
	RootlessCgroups bool            `json:"rootless_cgroups"`
}

// readState reads the runtime's state of the container; ok is false if there is
// none that is understood.
func (r *Runtime) readState() (s state, ok bool) {
	data, err := os.ReadFile(filepath.Join(r.dir(), stateName))
	if err != nil {
		return s, false
	}
	return parseState(data, r.id)
}

func parseState(data []byte, id string) (s state, ok bool) {
	if err := json.Unmarshal(data, &s); err != nil {
		return state{}, false
	}
	whole := s.ID == id && s.Pid > 0 && s.Config != nil && s.Config.Cgroups != nil && len(s.CgroupPaths) > 0
	for _, p := range s.CgroupPaths {
		whole = whole && filepath.IsAbs(p) && filepath.Clean(p) == p && p != "/"
	}
	return s, whole
}

// plain reports whether control groups and a directory are all that there is of the
// container once its processes have ended.
func (s state) plain() bool {
	return !s.rootless() && !s.Config.Cgroups.Systemd && s.IntelRdtPath == "" && s.IntelRdtMon == ""
}

func (s state) rootless() bool { return s.Rootless || s.Config.RootlessCgroups }

// ended reports whether the first process has. Its number may be another's by now.
func (s state) ended() bool {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.Pid), "stat"))
	if err != nil {
		return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH)
	}
	status, start, ok := parseStat(string(stat))
	return ok && (status == "Z" || status == "X" || start != s.StartTime)
}

// parseStat reads a line of /proc/PID/stat, whose second field is a name that may be
// anything.
func parseStat(stat string) (status string, start uint64, ok bool) {
	const statusField, startField = 0, 19 // after the name
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) <= startField {
		return "", 0, false
	}
	start, err := strconv.ParseUint(f[startField], 10, 64)
	return f[statusField], start, err == nil
}

// Delete takes the container away, with its processes if force is set. One that
// is not there is no error. The runtime itself is asked where more is to be taken
// away than control groups and its directory, or where a process is left.
func (r *Runtime) Delete(ctx context.Context, force bool) error {
	if _, err := os.Stat(r.dir()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	h, err := r.hooks()
	s, ok := r.readState()
	if !ok {
		s, ok = r.readCrun()
	}
	over := ok && s.ended()
	if over && err == nil && len(h.Poststop) == 0 && s.plain() && each(s.CgroupPaths, cgrouptree.Remove) == nil {
		if err := os.RemoveAll(r.dir()); err != nil {
			return fmt.Errorf("remove the directory of the OCI runtime: %w", err)
		}
		return nil
	}
	if over {
		// A container may have made groups, deeper than the runtime can go, whose own
		// error will tell.
		_ = each(s.CgroupPaths, cgrouptree.Prune)
	}
	return r.explain("delete", r.runc.Log, r.runc.Delete(ctx, r.id, &runc.DeleteOpts{Force: force}))
}

// each does the same to control groups until that fails.
func each(paths map[string]string, do func(dir string) error) error {
	for _, p := range paths {
		if err := do(p); err != nil {
			return err
		}
	}
	return nil
}

// Status is what the container is: "created", "running", "paused" or "stopped". The
// runtime itself is asked if its files do not say.
func (r *Runtime) Status(ctx context.Context) (string, error) {
	if s, ok := r.readState(); ok {
		if said, ok := s.status(filepath.Join(r.dir(), StartPipe)); ok {
			return said, nil
		}
	}
	c, err := r.runc.State(ctx, r.id)
	if err != nil {
		return "", r.explain("state", r.runc.Log, err)
	}
	return c.Status, nil
}

// status is what the kernel and a file say; ok is false if the control group
// does not tell.
func (s state) status(fifo string) (said string, ok bool) {
	frozen, ok := s.frozen()
	switch {
	case !ok:
		return "", false
	case frozen:
		return "paused", true
	case s.ended():
		return "stopped", true
	}
	if _, err := os.Stat(fifo); err == nil {
		return "created", true
	}
	return "running", true
}

// frozen reads the freezer of either version.
func (s state) frozen() (frozen, ok bool) {
	file, thawed := filepath.Join(s.CgroupPaths["freezer"], "freezer.state"), "THAWED"
	if s.CgroupPaths["freezer"] == "" {
		file, thawed = filepath.Join(s.CgroupPaths[""], "cgroup.freeze"), "0"
	}
	data, err := os.ReadFile(file)
	return strings.TrimSpace(string(data)) != thawed, err == nil
}
