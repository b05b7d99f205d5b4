package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
)

// attached is a network that a pod gets, under the interface name it has there.
type attached struct {
	ifName string
	conf   *libcni.NetworkConfigList
}

// source is where network configurations are read from.
type source struct {
	dir string
	max int
}

func (n *Networks) source(a Attachment) source {
	if a.ConfDir == "" {
		return source{n.conf.ConfDir, n.conf.MaxConfNum}
	}
	return source{a.ConfDir, a.MaxConfNum}
}

// load reads the networks of a pod from the configuration directory, which is
// cheap against running a plugin and cannot be out of date. The default
// network comes first and is eth0.
func (n *Networks) load(src source) ([]attached, error) {
	files, err := libcni.ConfFiles(src.dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("read network configuration: %w: %w", err, errdefs.ErrUnavailable)
	}
	slices.Sort(files)
	var lists []*libcni.NetworkConfigList
	if n.conf.DefaultNetwork != "" && src.dir == n.conf.ConfDir {
		lists, err = pickNamed(files, n.conf.DefaultNetwork, src.max)
	} else {
		lists, err = pickFirst(files, src.max)
	}
	if err != nil {
		return nil, err
	}
	if len(lists) == 0 {
		return nil, fmt.Errorf("no network configuration in %s: %w", src.dir, errdefs.ErrUnavailable)
	}
	nets := make([]attached, len(lists))
	for i, l := range lists {
		nets[i] = attached{ifName: "eth" + strconv.Itoa(i), conf: l}
	}
	return nets, nil
}

// pickFirst takes the first files. One of them that cannot be used is an
// error: to go on with the next would move pods to another network unnoticed.
func pickFirst(files []string, most int) ([]*libcni.NetworkConfigList, error) {
	var lists []*libcni.NetworkConfigList
	for _, f := range files {
		if most > 0 && len(lists) == most {
			break
		}
		l, err := readConf(f)
		if err != nil {
			return nil, err
		}
		lists = append(lists, l)
	}
	return lists, nil
}

// pickNamed takes the network with that name and then the first others.
func pickNamed(files []string, name string, most int) ([]*libcni.NetworkConfigList, error) {
	var lists []*libcni.NetworkConfigList
	var first *libcni.NetworkConfigList
	var reason error
	for _, f := range files {
		l, err := readConf(f)
		switch {
		case err != nil:
			reason = err
		case l.Name == name && first == nil:
			first = l
		default:
			lists = append(lists, l)
		}
	}
	if first == nil {
		if reason != nil {
			return nil, fmt.Errorf("no network named %q: %w", name, reason)
		}
		return nil, fmt.Errorf("no network named %q among %d configurations: %w", name, len(lists), errdefs.ErrUnavailable)
	}
	lists = slices.Insert(lists, 0, first)
	if most > 0 && len(lists) > most {
		lists = lists[:most]
	}
	return lists, nil
}

// readConf reads a configuration list, or a single plugin's configuration in
// the older form.
func readConf(file string) (*libcni.NetworkConfigList, error) {
	list, err := parseConfFile(file)
	if err == nil {
		err = checkConf(list)
	}
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w: %w", file, err, errdefs.ErrFailedPrecondition)
	}
	return list, nil
}

func parseConfFile(file string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(file) == ".conflist" {
		return libcni.NetworkConfFromFile(file)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseSingle(data)
}

// parseSingle wraps the configuration of one plugin into a list.
func parseSingle(data []byte) (*libcni.NetworkConfigList, error) {
	plugin, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	wrapped, err := json.Marshal(map[string]any{
		"name": plugin.Network.Name, "cniVersion": plugin.Network.CNIVersion,
		"loadOnlyInlinedPlugins": true, "plugins": []json.RawMessage{data},
	})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(wrapped)
}

// checkConf reports what can be read and not be run.
func checkConf(list *libcni.NetworkConfigList) error {
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return fmt.Errorf("name %q: %w", list.Name, err)
	}
	if len(list.Plugins) == 0 {
		return errors.New("no plugin in it")
	}
	for _, p := range list.Plugins {
		if strings.ContainsRune(p.Network.Type, '/') {
			return fmt.Errorf("plugin type %q is a path", p.Network.Type)
		}
	}
	return nil
}
