package task

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantry-cri/gantry/shim/process"
)

// Record is what is on disk of a container. It is there before anything is made
// for the container, and goes when nothing is left: a supervisor that comes
// after a crash, and the shim's delete, find by it what there is.
type Record struct {
	ID, Bundle string
	Options    *options.Options
	Stdio      paths
	// Rootfs says that the bundle's root filesystem was mounted here.
	Rootfs bool
	// Shared says that other processes do not end with the first one.
	Shared bool
	// Pid is 0 until the container was made.
	Pid int
	// Started says that it was started; it may have been also where that is not said.
	Started bool          `json:",omitempty"`
	Exit    *process.Exit `json:",omitempty"`
}

const pinFile = "pidfd"

// removeRecord takes away a container's directory, pin and all.
func removeRecord(dir string) error {
	if err := dropHolder(dir); err != nil {
		return err
	}
	if err := dropLoggers(dir); err != nil {
		return err
	}
	if err := process.Unpin(filepath.Join(dir, pinFile)); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// config is what is read of the specification of a bundle.
type config struct {
	Process struct{ OOMScoreAdj *int }
	Linux   struct{ Namespaces []specs.LinuxNamespace }
}

func readConfig(bundle string) (c config, err error) {
	data, err := os.ReadFile(filepath.Join(bundle, configFile))
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("read config.json: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	return c, nil
}

// shared tells whether the container has no pid namespace of its own, with which all
// its processes would end.
func (c config) shared() bool {
	return !slices.ContainsFunc(c.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.PIDNamespace && ns.Path == ""
	})
}

// lastExit tells how the first process of a container ended, 137 at this moment
// if nobody knows.
func (r Record) lastExit(dir string) process.Exit {
	if r.Exit != nil {
		return *r.Exit
	}
	if exit, err := process.PinnedExit(filepath.Join(dir, pinFile)); err == nil {
		return exit
	}
	return process.Exit{Code: unknownCode, At: time.Now()}
}

// unknownCode stands for an end that nobody saw: that of SIGKILL.
const unknownCode = 137
