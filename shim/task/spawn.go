package task

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gantry-cri/gantry/shim/process"
)

// spawn starts a program that outlives the supervisor and that the next one finds by the
// pin. It has files from number 3 on, nothing as the ones before, and a session of its own.
// The caller holds the reaper, so nobody reaps it before it is opened.
func spawn(pin, program string, args, env []string, files []uintptr) (*process.Process, error) {
	nothing, err := openRaw(os.DevNull, unix.O_RDWR)
	if err != nil {
		return nil, err
	}
	defer nothing.Close()
	pid, err := syscall.ForkExec(program, args, &syscall.ProcAttr{
		Dir: "/", Env: env, Files: append([]uintptr{nothing.Fd(), nothing.Fd(), nothing.Fd()}, files...),
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, err
	}
	err = process.Note(pin, pid)
	if err == nil {
		var p *process.Process
		if p, err = process.OpenPinned(pin, pid); err == nil {
			return p, nil
		}
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	_, _ = unix.Wait4(pid, nil, 0, nil)
	return nil, err
}
