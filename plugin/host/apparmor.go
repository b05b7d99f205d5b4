package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const (
	appArmorProfiles = "/sys/kernel/security/apparmor/profiles"
	appArmorParser   = "apparmor_parser"
	// appArmorLimit bounds the parser, which compiles the profile.
	appArmorLimit = 30 * time.Second
)

// appArmorText is the default profile, NAME being its name. It includes no
// file: what a distribution has in its own is not what was tried.
//
// It takes nothing away that a container's capabilities do not give, and keeps
// a process with CAP_SYS_ADMIN from the settings of the whole machine. Deny
// rules win over all others. Signals are allowed from whoever has to end a
// container: the runtimes, which distributions confine, and the unconfined.
const appArmorText = `profile NAME flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  deny mount,

  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (receive) peer=/usr/{bin,sbin,local/bin,local/sbin}/{runc,crun},
  signal (send, receive) peer=NAME,
  ptrace (trace, read, tracedby, readby) peer=NAME,

  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,
  deny /proc/{acpi,bus,fs,irq,scsi}/** wklx,
  deny /proc/sys/{abi,debug,dev,vm}/** wklx,
  deny /proc/sys/fs/[^m]** wklx,
  deny /proc/sys/kernel/[^dms]** wklx,
  deny /proc/sys/kernel/{dmesg,max_,modprobe,modules,sched,seccomp,soft,split,stack,sysctl,sysrq}** wklx,

  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,kernel,module,power}/** wklx,
  deny /sys/fs/[^c]** wklx,
}
`

// LoadAppArmor loads the default AppArmor profile under the given name, in
// place of one that is loaded already.
func LoadAppArmor(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), appArmorLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, appArmorParser, "--replace", "--skip-cache")
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(appArmorText, "NAME", name))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("load AppArmor profile %s: %w: %.1000s (%w)", name, err, bytes.TrimSpace(out), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// NeedAppArmor makes certain that a process can be put under a profile: own,
// the default one, is loaded if somebody has removed it; any other has to be
// there. "" is no profile.
func NeedAppArmor(name, own string) error { return prober{}.needAppArmor(name, own) }

func (p prober) needAppArmor(name, own string) error {
	if name == "" {
		return nil
	}
	loaded, err := p.appArmorLoaded(name)
	switch {
	case err != nil:
		return fmt.Errorf("look for AppArmor profile %q: %w", name, err)
	case loaded:
		return nil
	case name == own:
		return LoadAppArmor(name)
	}
	return fmt.Errorf("AppArmor profile %q is not loaded on this node: %w", name, errdefs.ErrFailedPrecondition)
}

// appArmorLoaded looks for a profile in the kernel's list, whose lines are a
// name, which may have spaces, and a mode in parentheses.
func (p prober) appArmorLoaded(name string) (bool, error) {
	f, err := os.Open(filepath.Join(p.root, appArmorProfiles))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, classed(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if i := strings.LastIndex(lines.Text(), " ("); i >= 0 && lines.Text()[:i] == name {
			return true, nil
		}
	}
	if err := lines.Err(); err != nil {
		return false, classed(err)
	}
	return false, nil
}
