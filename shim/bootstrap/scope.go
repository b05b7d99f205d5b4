package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// scopeLimit is how long systemd may take: who starts the first pod waits for it.
const scopeLimit = 5 * time.Second

// enterScope makes a unit of systemd for this process and its anchor, where systemd runs,
// so that they are no part of containerd's service: whoever has systemd kill all of that
// does not end what holds the pods of the node, and its memory is shown apart. What an
// earlier supervisor left may have kept the unit alive: then they join that.
func (s supervisor) enterScope(ctx context.Context) error {
	if info, err := os.Lstat("/run/systemd/system"); err != nil || !info.IsDir() {
		return nil // sd_booted(3)
	}
	ctx, cancel := context.WithTimeout(ctx, scopeLimit)
	defer cancel()
	conn, err := systemd.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	pids := []uint32{uint32(os.Getpid())}
	if s.anchor != "" {
		pids = append(pids, uint32(os.Getppid()))
	}
	name, done := filepath.Base(s.socket)+".scope", make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, name, "fail", []systemd.Property{
		systemd.PropDescription("gantry: supervisor of pods"),
		systemd.PropPids(pids...),
		// Its end is not wanted before that of the pods, when the machine goes down.
		{Name: "DefaultDependencies", Value: dbus.MakeVariant(false)},
		// Without it nothing may join.
		{Name: "Delegate", Value: dbus.MakeVariant(true)},
		{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")},
	}, done)
	var refused dbus.Error
	if errors.As(err, &refused) && refused.Name == "org.freedesktop.systemd1.UnitExists" {
		if err := conn.AttachProcessesToUnit(ctx, name, "", pids); err != nil {
			return fmt.Errorf("join unit %s: %w", name, err)
		}
		return nil
	}
	if err != nil {
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
