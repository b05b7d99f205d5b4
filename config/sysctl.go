package config

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

var (
	// sysctlName is one or more words joined by dots or slashes; no word is
	// empty or "..", because names become paths.
	sysctlName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?([./][A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*$`)
	// sysctlValue is what values of namespaced settings are made of: numbers,
	// lists, ranges, names, addresses.
	sysctlValue = regexp.MustCompile(`^[A-Za-z0-9 \t,._:/-]*$`)

	ipcSysctls = []string{
		"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
		"kernel.shm_rmid_forced", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	}
)

// maxSysctl bounds a name and a value.
const maxSysctl = 4096

// Sysctl returns a kernel setting's dotted name and the namespace it belongs to.
// One that belongs to none, or could be no setting's name or value, is an error.
func Sysctl(name, value string) (dotted string, kind specs.LinuxNamespaceType, err error) {
	if len(name) > maxSysctl || !sysctlName.MatchString(name) {
		return "", "", fmt.Errorf("%.64q is not a name of a kernel setting", name)
	}
	if len(value) > maxSysctl || !sysctlValue.MatchString(value) {
		return "", "", fmt.Errorf("value %.64q has characters no setting needs", value)
	}
	dotted = dottedSysctl(name)
	switch {
	case strings.HasPrefix(dotted, "net."), dotted == "kernel.domainname": // a pod's host name goes with its network
		return dotted, specs.NetworkNamespace, nil
	case strings.HasPrefix(dotted, "fs.mqueue."), slices.Contains(ipcSysctls, dotted):
		return dotted, specs.IPCNamespace, nil
	}
	return "", "", fmt.Errorf("%s is not a setting of a namespace", dotted)
}

// dottedSysctl returns the dotted form of a name. The first separator decides
// which form it has; in the other form dots and slashes change places
// ("net/ipv4/conf/eth0.1/forwarding" is "net.ipv4.conf.eth0/1.forwarding").
func dottedSysctl(name string) string {
	if i := strings.IndexAny(name, "./"); i < 0 || name[i] == '.' {
		return name
	}
	return strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
}
