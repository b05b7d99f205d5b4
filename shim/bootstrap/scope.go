package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	// scopeLimit is how long systemd may take: who starts the first pod waits for it.
	scopeLimit = 5 * time.Second
	// scopePause is how long a unit that is neither there nor gone is left alone.
	scopePause = 200 * time.Millisecond
)

// enterScope makes a unit of systemd for this process and its anchor, where systemd runs,
// so that they are no part of containerd's service: whoever has systemd kill all of that
// does not end what holds the pods of the node, and its memory is shown apart. What an
// earlier supervisor left may have kept the unit alive: then they join that.
func (s supervisor) enterScope(ctx context.Context) error {
	if info, err := os.Lstat("/run/systemd/system"); err != nil || !info.IsDir() {
		return nil // sd_booted(3)
	}
	if !firstPids() {
		return nil // in a container: it would take our numbers for those of others
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("find own unit: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, scopeLimit)
	defer cancel()
	conn, err := systemd.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	pids := []uint32{uint32(os.Getpid())}
	if parent := os.Getppid(); s.anchor != "" && parent > 1 {
		pids = append(pids, uint32(parent))
	}
	name := filepath.Base(s.socket) + ".scope"
	for {
		err := startScope(ctx, conn, name, scopeProperties(string(groups), pids))
		if !isRefusal(err, "UnitExists") {
			return err
		}
		err = conn.AttachProcessesToUnit(ctx, name, "", pids)
		if err == nil {
			return nil
		}
		// It may be about to go.
		select {
		case <-time.After(scopePause):
		case <-ctx.Done():
			return fmt.Errorf("join unit %s: %w", name, err)
		}
	}
}

func startScope(ctx context.Context, conn *systemd.Conn, name string, properties []systemd.Property) error {
	done := make(chan string, 1)
	if _, err := conn.StartTransientUnitContext(ctx, name, "fail", properties, done); err != nil {
		return fmt.Errorf("start unit %s: %w", name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("start unit %s: systemd says %s", name, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("start unit %s: %w", name, context.Cause(ctx))
	}
}

func isRefusal(err error, name string) bool {
	var refused dbus.Error
	return errors.As(err, &refused) && refused.Name == "org.freedesktop.systemd1."+name
}

// scopeProperties are those of the unit of processes that are in the control groups of a
// text like /proc/PID/cgroup now.
func scopeProperties(groups string, pids []uint32) []systemd.Property {
	is := func(name string, value any) systemd.Property {
		return systemd.Property{Name: name, Value: dbus.MakeVariant(value)}
	}
	all := []systemd.Property{
		systemd.PropDescription("gantry: supervisor of pods"),
		systemd.PropPids(pids...),
		// Without it nothing may join.
		is("Delegate", true),
		// OCI runtimes begin there, many at once after a start of the node.
		is("TasksMax", uint64(math.MaxUint64)),
		// When the machine goes down nobody asks how containers ended, and nothing else
		// ends a supervisor that has some.
		is("KillSignal", int32(unix.SIGKILL)),
		is("CollectMode", "inactive-or-failed"),
	}
	slice, service := unitsOf(groups)
	if slice != "" {
		all = append(all, systemd.PropSlice(slice))
	}
	if service != "" {
		all = append(all, systemd.PropBefore(service)) // it is stopped first
	}
	return all
}

// unitsOf finds the innermost slice and the service in the path that systemd has made, ""
// for none.
func unitsOf(groups string) (slice, service string) {
	for line := range strings.Lines(groups) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || fields[0] != "0" && fields[1] != "name=systemd" {
			continue
		}
		for unit := range strings.SplitSeq(fields[2], "/") {
			switch filepath.Ext(unit) {
			case ".slice":
				slice = unit
			case ".service":
				service = unit
			}
		}
		if slice != "" || service != "" {
			break
		}
	}
	return slice, service
}

// initialPids is the file of the first process namespace (PROC_PID_INIT_INO in
// include/linux/proc_ns.h).
const initialPids = "pid:[4026531836]"

// firstPids reports whether processes have the same numbers here as for systemd.
func firstPids() bool {
	is, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && is == initialPids
}
