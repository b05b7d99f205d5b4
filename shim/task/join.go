package task

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Join returns where a sandbox's namespace of a kind is, "" for the host's.
type Join func(sandbox string, kind specs.LinuxNamespaceType) (path string, err error)

const (
	// noProcess opens the paths by which whoever makes a specification means the
	// namespaces of a sandbox without a process: there is no process 0.
	noProcess = "/proc/0/ns/"
	// sandboxFile is in the bundle of a container that has a sandbox.
	sandboxFile = "sandbox"
	configFile  = "config.json"
)

// joinSandbox puts the paths of the sandbox's namespaces into the specification
// of a bundle. Nothing else of it is touched, and one that names no namespace of
// process 0 not at all.
func joinSandbox(bundle string, join Join) error {
	path := filepath.Join(bundle, configFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !bytes.Contains(data, []byte(noProcess)) {
		return nil
	}
	joined, err := joinedSpec(data, func(kind specs.LinuxNamespaceType) (string, error) {
		id, err := os.ReadFile(filepath.Join(bundle, sandboxFile))
		if errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("the container is in no sandbox: %w", errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return "", err
		}
		return join(string(id), kind)
	})
	if err != nil {
		return fmt.Errorf("join the namespaces of the sandbox: %w", err)
	}
	next := filepath.Join(bundle, "."+configFile)
	if err := os.WriteFile(next, joined, 0o600); err != nil {
		return err
	}
	return os.Rename(next, path)
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
