package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"
)

// saved is what ADD is asked for one pod. It is written before the first
// plugin runs and removed after everything has been given back.
type saved struct {
	ID       string         `json:"id"`
	NetNS    string         `json:"netns"`
	Args     [][2]string    `json:"args"`
	Caps     map[string]any `json:"capabilities,omitempty"`
	Networks []savedNetwork `json:"networks"`
	// HostPorts are those that no plugin maps.
	HostPorts []portMapping `json:"hostPorts,omitempty"`
}

// savedNetwork is one network of a pod with its whole configuration: DEL must
// see what ADD saw, also when the file has changed or is gone.
type savedNetwork struct {
	IfName string          `json:"ifName"`
	Conf   json.RawMessage `json:"conf"`
}

// freeze writes a configuration out with all its plugins inside.
func freeze(ifName string, list *libcni.NetworkConfigList) (savedNetwork, error) {
	plugins := make([]json.RawMessage, len(list.Plugins))
	for i, p := range list.Plugins {
		plugins[i] = p.Bytes
	}
	conf, err := json.Marshal(map[string]any{
		"name": list.Name, "cniVersion": list.CNIVersion,
		"disableCheck": list.DisableCheck, "disableGC": list.DisableGC,
		"loadOnlyInlinedPlugins": true, "plugins": plugins,
	})
	return savedNetwork{IfName: ifName, Conf: conf}, err
}

// list is the inverse of freeze.
func (a savedNetwork) list() (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(a.Conf)
	if err != nil {
		return nil, fmt.Errorf("read saved configuration of %s: %w: %w", a.IfName, err, errdefs.ErrDataLoss)
	}
	return list, nil
}

func (s *saved) runtimeConf(a savedNetwork, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: s.ID, NetNS: netns, IfName: a.IfName, Args: s.Args, CapabilityArgs: s.Caps,
	}
}

// since reports whether the configuration is of at least that version of the
// specification.
func since(list *libcni.NetworkConfigList, v string) bool {
	ok, err := version.GreaterThanOrEqualTo(list.CNIVersion, v)
	return err == nil && ok
}

// savedDir is the directory of saved attachments, one file per pod.
type savedDir string

const savedSuffix = ".json"

func (d savedDir) path(id string) string { return filepath.Join(string(d), id+savedSuffix) }

// write replaces the file as a whole, so that a crash of the daemon or of the
// machine leaves the old or the new one.
func (d savedDir) write(s *saved) (err error) {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("save attachment: %w", err)
	}
	tmp := d.path(s.ID) + ".new"
	err = writeSynced(tmp, data)
	if err == nil {
		err = os.Rename(tmp, d.path(s.ID))
	}
	if err != nil {
		return fmt.Errorf("save attachment: %w", errors.Join(err, d.discard(tmp)))
	}
	return nil
}

// writeSynced has the content on the disk before anything names it.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// read returns nil if nothing usable is saved for the pod: a file that cannot
// be understood is taken as none, so that it never keeps a pod from going.
func (d savedDir) read(id string) (*saved, error) {
	data, err := os.ReadFile(d.path(id))
	if missing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read saved attachment: %w", err)
	}
	return thaw(id, data), nil
}

func thaw(id string, data []byte) *saved {
	var s saved
	if json.Unmarshal(data, &s) != nil || s.ID != id {
		return nil
	}
	for _, a := range s.Networks {
		if _, err := a.list(); err != nil {
			return nil
		}
	}
	return &s
}

func (d savedDir) remove(id string) error {
	return errors.Join(d.discard(d.path(id)+".new"), d.discard(d.path(id)))
}

func (d savedDir) discard(path string) error {
	if err := os.Remove(path); err != nil && !missing(err) {
		return fmt.Errorf("forget saved attachment: %w", err)
	}
	return nil
}

func (d savedDir) ids() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil && !missing(err) {
		return nil, fmt.Errorf("list saved attachments: %w", err)
	}
	var ids []string
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".new")
		if id, ok := strings.CutSuffix(name, savedSuffix); ok && checkID(id) == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// recall returns what is known of a pod's attachments: what was saved before
// ADD, else what libcni keeps since an ADD that succeeded, else nil.
func (n *Networks) recall(id string) (*saved, error) {
	s, err := n.saved.read(id)
	if s != nil || err != nil {
		return s, err
	}
	cached, err := n.cni.GetCachedAttachments(id)
	if err != nil {
		return nil, fmt.Errorf("read cached attachments: %w", err)
	}
	for _, c := range cached {
		a := savedNetwork{IfName: c.IfName, Conf: c.Config}
		if _, err := a.list(); err != nil {
			continue
		}
		if s == nil {
			s = &saved{ID: id, NetNS: c.NetNS, Args: c.CniArgs, Caps: c.CapabilityArgs}
		}
		s.Networks = append(s.Networks, a)
	}
	return s, nil
}
