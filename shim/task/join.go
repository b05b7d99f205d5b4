package task

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Join returns where a sandbox's namespace of a kind is, "" for the host's.
type Join func(sandbox string, kind specs.LinuxNamespaceType) (path string, err error)

// Files returns the files that a sandbox has for its containers, by where they are to be
// in a container.
type Files func(sandbox string) (map[string]string, error)

const (
	// noProcess opens the paths by which whoever makes a specification means the
	// namespaces of a sandbox without a process: there is no process 0.
	noProcess = "/proc/0/ns/"
	// sandboxFile is in the bundle of a container that has a sandbox.
	sandboxFile = "sandbox"
	configFile  = "config.json"
)

// joinSandbox puts the paths of the sandbox's namespaces into the specification
// of a bundle, and mounts for its files. Nothing else of it is touched, and one that
// names no namespace of process 0, in a sandbox without files, not at all.
func joinSandbox(bundle string, join Join, files Files) error {
	path := filepath.Join(bundle, configFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	id, err := os.ReadFile(filepath.Join(bundle, sandboxFile))
	inNone := errors.Is(err, os.ErrNotExist)
	if err != nil && !inNone {
		return err
	}
	joined := data
	if bytes.Contains(data, []byte(noProcess)) {
		joined, err = joinedSpec(data, func(kind specs.LinuxNamespaceType) (string, error) {
			if inNone {
				return "", fmt.Errorf("the container is in no sandbox: %w", errdefs.ErrInvalidArgument)
			}
			return join(string(id), kind)
		})
		if err != nil {
			return fmt.Errorf("join the namespaces of the sandbox: %w", err)
		}
	}
	if files != nil && !inNone {
		has, err := files(string(id))
		if err == nil && len(has) > 0 {
			joined, err = withFiles(joined, has)
		}
		if err != nil {
			return fmt.Errorf("files of the sandbox: %w", err)
		}
	}
	if bytes.Equal(joined, data) {
		return nil
	}
	next := filepath.Join(bundle, "."+configFile)
	if err := os.WriteFile(next, joined, 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// sharedMemory is where a specification has a file system of the container's own unless
// it is told better.
const sharedMemory = "/dev/shm"

// withFiles returns the specification with a mount for each of the files, by where they
// are to be, that it has no other for.
func withFiles(data []byte, files map[string]string) ([]byte, error) {
	var spec map[string]json.RawMessage
	var root specs.Root
	var all, kept []json.RawMessage
	if err := errors.Join(decode(data, &spec, "it"), decode(spec["root"], &root, "root"), decode(spec["mounts"], &all, "mounts")); err != nil {
		return nil, err
	}
	add := func(at string) error {
		m := specs.Mount{Destination: at, Type: "bind", Source: files[at], Options: []string{"rbind", "rprivate", "rw"}}
		switch {
		case at == sharedMemory:
			m.Options = append(m.Options, "nosuid", "noexec", "nodev")
		case root.Readonly:
			m.Options[2] = "ro"
		}
		raw, err := json.Marshal(m)
		kept = append(kept, raw)
		return err
	}
	there := map[string]bool{}
	for _, raw := range all {
		var m specs.Mount
		if err := decode(raw, &m, "mounts"); err != nil {
			return nil, err
		}
		at := filepath.Clean(m.Destination)
		there[at] = true
		if at == sharedMemory && m.Type == "tmpfs" && files[at] != "" {
			if err := add(at); err != nil { // in its place: others may be below it
				return nil, err
			}
			continue
		}
		kept = append(kept, raw)
	}
	for _, at := range slices.Sorted(maps.Keys(files)) {
		if !there[at] {
			if err := add(at); err != nil {
				return nil, err
			}
		}
	}
	var err error
	if spec["mounts"], err = json.Marshal(kept); err != nil {
		return nil, err
	}
	return json.Marshal(spec)
}

// joinedSpec returns the specification with the paths that find gives, in place
// of those of process 0. A namespace that is the host's is left out.
func joinedSpec(data []byte, find func(specs.LinuxNamespaceType) (string, error)) ([]byte, error) {
	var spec, linux map[string]json.RawMessage
	var all, kept []specs.LinuxNamespace
	if err := decode(data, &spec, "it"); err != nil {
		return nil, err
	}
	if err := decode(spec["linux"], &linux, "linux"); err != nil {
		return nil, err
	}
	if err := decode(linux["namespaces"], &all, "linux.namespaces"); err != nil {
		return nil, err
	}
	for _, ns := range all {
		if strings.HasPrefix(ns.Path, noProcess) {
			path, err := find(ns.Type)
			if err != nil {
				return nil, err
			}
			if path == "" {
				continue
			}
			ns.Path = path
		}
		kept = append(kept, ns)
	}
	var err error
	if linux["namespaces"], err = json.Marshal(kept); err != nil {
		return nil, err
	}
	if spec["linux"], err = json.Marshal(linux); err != nil {
		return nil, err
	}
	return json.Marshal(spec)
}

func decode(data []byte, into any, field string) error {
	if len(data) == 0 {
		return fmt.Errorf("read specification: no %s: %w", field, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("read specification: %s: %w: %w", field, errdefs.ErrInvalidArgument, err)
	}
	return nil
}
