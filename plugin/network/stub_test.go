package network_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stubName is the plugin type of the stub, and what its binary is called.
const stubName = "stub"

// stub is the test's hold on a stub plugin: an honest one that keeps a book of
// what it allocated, records how it is called, and does wrong on request.
type stub struct{ dir string }

// behaviour is what the stub shall do for a command.
type behaviour struct {
	// Code and Msg make it fail; ADD allocates first.
	Code uint   `json:"code,omitempty"`
	Msg  string `json:"msg,omitempty"`
	// Hang makes it wait forever, after starting a child that does, too.
	Hang bool `json:"hang,omitempty"`
	// Leave makes it leave a child behind that holds its output open.
	Leave bool `json:"leave,omitempty"`
	// Only limits all that to one container.
	Only string `json:"only,omitempty"`
	// Garbage makes it exit with an error after printing this.
	Garbage string `json:"garbage,omitempty"`
}

// call is one call of the stub as it saw it.
type call struct {
	Command, ID, NetNS, IfName, Args string
	Pid                              int
	Conf                             map[string]any
}

func (s stub) plugin() map[string]any {
	return map[string]any{"type": stubName, "dir": s.dir, "capabilities": map[string]bool{
		"portMappings": true, "bandwidth": true, "dns": true, "cgroupPath": true,
		"io.kubernetes.cri.pod-annotations": true,
	}}
}

func (s stub) behave(t *testing.T, command string, b behaviour) {
	t.Helper()
	data, err := json.Marshal(b)
	mustDo(t, err)
	tmp := filepath.Join(s.dir, "tmp")
	mustDo(t, os.WriteFile(tmp, data, 0o644))
	mustDo(t, os.Rename(tmp, filepath.Join(s.dir, "behave-"+command)))
}

// calls returns the calls of a command, the first one first.
func (s stub) calls(t *testing.T, command string) []call {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "calls", "*"))
	mustDo(t, err)
	slices.Sort(files)
	var calls []call
	for _, f := range files {
		var c call
		data, err := os.ReadFile(f)
		mustDo(t, err)
		if json.Unmarshal(data, &c) == nil && c.Command == command {
			calls = append(calls, c)
		}
	}
	return calls
}

// processes lists the stub's processes and their children that are alive.
func (s stub) processes(t *testing.T) []int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "pids", "*"))
	mustDo(t, err)
	var alive []int
	for _, f := range files {
		pid, err := strconv.Atoi(filepath.Base(f))
		mustDo(t, err)
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err == nil && !strings.Contains(string(stat), ") Z ") {
			alive = append(alive, pid)
		}
	}
	return alive
}

// stubMain is the plugin.
func stubMain() int {
	var conf map[string]any
	if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
		return stubFail(6, err.Error())
	}
	c := call{
		Command: os.Getenv("CNI_COMMAND"), ID: os.Getenv("CNI_CONTAINERID"), NetNS: os.Getenv("CNI_NETNS"),
		IfName: os.Getenv("CNI_IFNAME"), Args: os.Getenv("CNI_ARGS"), Pid: os.Getpid(), Conf: conf,
	}
	dir := conf["dir"].(string)
	if err := stubRecord(dir, c); err != nil {
		return stubFail(999, err.Error())
	}
	held := filepath.Join(dir, "held", c.ID+"-"+c.IfName)
	if c.Command == "ADD" {
		if err := os.WriteFile(held, nil, 0o644); err != nil {
			return stubFail(999, err.Error())
		}
	}
	if code, done := stubMisbehave(dir, c); done {
		return code
	}
	switch c.Command {
	case "DEL":
		_ = os.Remove(held) // a second DEL finds nothing, rightly
	case "ADD":
		return stubResult(conf, c)
	}
	return 0
}

func stubRecord(dir string, c call) error {
	for _, sub := range []string{"calls", "pids", "held"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "pids", strconv.Itoa(c.Pid)), nil, 0o644); err != nil {
		return err
	}
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return err
	}
	name := fmt.Sprintf("%020d-%d", now.Nano(), c.Pid)
	return os.WriteFile(filepath.Join(dir, "calls", name), data, 0o644)
}

func stubMisbehave(dir string, c call) (int, bool) {
	var b behaviour
	data, err := os.ReadFile(filepath.Join(dir, "behave-"+c.Command))
	if err != nil || json.Unmarshal(data, &b) != nil || (b.Only != "" && b.Only != c.ID) {
		return 0, false
	}
	switch {
	case b.Hang:
		child, err := stubChild(dir)
		if err != nil {
			return stubFail(999, err.Error()), true
		}
		_ = os.WriteFile(filepath.Join(dir, "hanging"), nil, 0o644) // the test waits for it
		_ = child.Wait()
		return 1, true
	case b.Leave:
		if _, err := stubChild(dir); err != nil {
			return stubFail(999, err.Error()), true
		}
	case b.Garbage != "":
		fmt.Print(b.Garbage)
		return 3, true
	case b.Code != 0:
		return stubFail(b.Code, b.Msg), true
	}
	return 0, false
}

// stubChild starts a process that holds the stub's output open.
func stubChild(dir string) (*exec.Cmd, error) {
	child := exec.CommandContext(context.Background(), "sleep", "3600")
	child.Stdout = os.Stdout
	if err := child.Start(); err != nil {
		return nil, err
	}
	return child, os.WriteFile(filepath.Join(dir, "pids", strconv.Itoa(child.Process.Pid)), nil, 0o644)
}

// killAll ends the processes that the stub has left.
func (s stub) killAll(t *testing.T) {
	t.Helper()
	for _, pid := range s.processes(t) {
		mustDo(t, syscall.Kill(pid, syscall.SIGKILL))
	}
	s.dead(t)
}

func stubFail(code uint, msg string) int {
	data, _ := json.Marshal(map[string]any{"cniVersion": "1.0.0", "code": code, "msg": msg})
	_, _ = os.Stdout.Write(data)
	return 1
}

// stubResult hands the previous result on, or makes one.
func stubResult(conf map[string]any, c call) int {
	result := conf["prevResult"]
	if result == nil {
		ips := []any{}
		for _, ip := range stubIPs(c.ID) {
			ips = append(ips, map[string]any{"address": ip, "interface": 0})
		}
		result = map[string]any{
			"cniVersion": conf["cniVersion"],
			"interfaces": []any{map[string]any{"name": c.IfName, "sandbox": c.NetNS}},
			"ips":        ips,
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		return 1
	}
	return 0
}

// stubIPs derives addresses from the ID: "x-6-4" has a v6 and a v4 one.
func stubIPs(id string) []string {
	var ips []string
	for i, family := range strings.Split(id, "-")[1:] {
		if family == "4" {
			ips = append(ips, fmt.Sprintf("10.88.65.%d/24", i+1))
		} else {
			ips = append(ips, fmt.Sprintf("fd00:10:89::%d/64", i+1))
		}
	}
	if len(ips) == 0 {
		ips = []string{"10.88.65.9/24"}
	}
	return ips
}

// dead waits for the end of every process of the stub.
func (s stub) dead(t *testing.T) {
	t.Helper()
	eventually(t, "the end of the stub's processes", func() bool { return len(s.processes(t)) == 0 })
}

// hanging waits until a call of the stub hangs.
func (s stub) hanging(t *testing.T) {
	t.Helper()
	eventually(t, "a hanging stub", func() bool {
		_, err := os.Stat(filepath.Join(s.dir, "hanging"))
		return err == nil
	})
}

// alive reports whether a process is there.
func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }
