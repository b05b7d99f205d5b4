package network

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
)

// NetNSDir is where network namespaces are pinned unless the configuration puts
// them below the state directory. Tools look for them there.
const NetNSDir = "/var/run/netns"

// StateNetNSDir returns where network namespaces are pinned below the plugin's
// state directory.
func StateNetNSDir(state string) string { return filepath.Join(state, "netns") }

// NetNSDirOf returns where the configuration has network namespaces pinned: in
// namespaces_dir if there is one, else below the state directory if they are to be.
func NetNSDirOf(namespaces string, inState bool, state string) string {
	switch {
	case namespaces != "":
		return filepath.Join(namespaces, "netns")
	case inState:
		return StateNetNSDir(state)
	}
	return NetNSDir
}

// CacheDir returns where networks are kept below the plugin's root directory. It
// is not below the state directory: after a reboot the plugins' books still have
// what is to be given back.
func CacheDir(root string) string { return filepath.Join(root, "network") }

// AttachmentsDir returns where a cache directory has its attachments, a file per
// pod.
func AttachmentsDir(cache string) string { return filepath.Join(cache, "attachments") }

// NetNSPrefix opens the names of the network namespaces that belong to a cache
// directory; the ID of the pod follows. Those of another daemon on the machine
// have another prefix.
func NetNSPrefix(cache string) string { return ownName(cache) + "-" }

// HostPortTable is the name of the table of nftables, of family inet, with the
// ports of the node that are the pods' of a cache directory. The names of chains
// of iptables begin with it.
func HostPortTable(cache string) string { return ownName(cache) }

// hostPortNote returns the file that says which tool of iptables has the ports.
func hostPortNote(cache string) string { return filepath.Join(cache, "hostports") }

func ownName(cache string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(cache)))
	return "gantry-" + hex.EncodeToString(sum[:4])
}
