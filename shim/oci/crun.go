package oci

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/opencontainers/cgroups"
)

const (
	// crunStateName is the file in which crun writes down what it has made.
	crunStateName = "status"
	// cgroupRoot is where crun takes the control groups to be.
	cgroupRoot = "/sys/fs/cgroup"
)

// crunState is what is read of it.
type crunState struct {
	Pid       int    `json:"pid"`
	StartTime uint64 `json:"process-start-time"`
	Cgroup    string `json:"cgroup-path"`
	Scope     string `json:"scope"`
	Systemd   bool   `json:"systemd-cgroup"`
	Owner     string `json:"owner"`
}

// readCrun reads what crun has made of the container, as far as it takes to take it
// away; ok is false if there is nothing that is understood. A container has one path
// in all hierarchies.
func (r *Runtime) readCrun() (s state, ok bool) {
	data, err := os.ReadFile(filepath.Join(r.dir(), crunStateName))
	if err != nil {
		return s, false
	}
	c, ok := parseCrun(data)
	if !ok {
		return s, false
	}
	var config struct {
		Linux struct{ IntelRdt json.RawMessage }
	}
	data, err = os.ReadFile(filepath.Join(r.bundle, specFile))
	if err != nil || json.Unmarshal(data, &config) != nil || config.Linux.IntelRdt != nil {
		return s, false
	}
	s = state{ID: r.id, Pid: c.Pid, StartTime: c.StartTime, CgroupPaths: map[string]string{}}
	s.Config = &stateConfig{Cgroups: &cgroups.Cgroup{}}
	if cgroups.IsCgroup2UnifiedMode() {
		s.CgroupPaths[""] = filepath.Join(cgroupRoot, c.Cgroup)
		return s, true
	}
	hierarchies, err := os.ReadDir(cgroupRoot)
	for _, h := range hierarchies {
		if h.IsDir() { // another is a link to one
			s.CgroupPaths[h.Name()] = filepath.Join(cgroupRoot, h.Name(), c.Cgroup)
		}
	}
	return s, err == nil
}

// parseCrun is not ok for a container whose control group is systemd's, or not root's.
func parseCrun(data []byte) (c crunState, ok bool) {
	if err := json.Unmarshal(data, &c); err != nil {
		return crunState{}, false
	}
	return c, c.Pid > 0 && c.StartTime > 0 && !c.Systemd && c.Scope == "" && c.Owner == "root" &&
		filepath.IsAbs(c.Cgroup) && filepath.Clean(c.Cgroup) == c.Cgroup && c.Cgroup != "/"
}
