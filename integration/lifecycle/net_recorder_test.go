package lifecycle

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gantry-cri/gantry/integration/daemon"
)

// The stub is a CNI plugin that notes every call and, told by files in its
// control directory, stalls or fails. It is this test binary under another
// name. Pods of the handler stubHandler have it as their only plugin, so a test
// uses it on the shared daemon without touching the network of others.
const (
	stubPlugin  = "gantry-test-stub"
	stubHandler = "stub"
	// stubAddress is what ADD gives a pod unless the test says otherwise.
	stubAddress = "10.99.0.5/24"
	// stubPatience ends a stall that nobody ended.
	stubPatience = time.Minute
)

func stubControl(dir string) string { return filepath.Join(dir, "stub") }
func stubBin(dir string) string     { return filepath.Join(dir, "stub", "bin") }
func stubConfDir(dir string) string { return filepath.Join(dir, "stub", "net.d") }

// stubConflist is a network whose only plugin is the stub.
func stubConflist(dir string) string {
	return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "stub", "plugins": [%s]}`, stubConf(dir))
}

// stubConf is the stub's own part of a configuration.
func stubConf(dir string) string {
	return fmt.Sprintf(`{"type": %q, "control": %q, "capabilities": {"portMappings": true, "bandwidth": true,
		"dns": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true}}`, stubPlugin, stubControl(dir))
}

// addStubHandler installs the stub and adds the handler that uses it.
func addStubHandler(in *daemon.Instance, c daemon.Config) {
	must(os.MkdirAll(stubBin(in.Dir), 0o755))
	must(os.MkdirAll(stubConfDir(in.Dir), 0o755))
	exe, err := os.Executable()
	must(err)
	must(os.Symlink(exe, filepath.Join(stubBin(in.Dir), stubPlugin)))
	must(os.WriteFile(filepath.Join(stubConfDir(in.Dir), "10-stub.conflist"), []byte(stubConflist(in.Dir)), 0o644))
	cni := c["plugins"].(daemon.Config)[daemon.RuntimePlugin].(daemon.Config)["cni"].(daemon.Config)
	cni["bin_dirs"] = append(cni["bin_dirs"].([]string), stubBin(in.Dir))
	addHandler(in, c, stubHandler, daemon.Config{"cni_conf_dir": stubConfDir(in.Dir)})
}

// addHandler adds a handler like the default one, save for what is given.
func addHandler(in *daemon.Instance, c daemon.Config, name string, keys daemon.Config) {
	at := []string{"plugins", daemon.RuntimePlugin, "containerd", "runtimes", name}
	c.Set("io.containerd.runc.v2", append(at, "runtime_type")...)
	c.Set(in.RuncOptions(nil), append(at, "options")...)
	for k, v := range keys {
		c.Set(v, append(at, k)...)
	}
}

// must is for what fails on a broken machine only, where no test is at hand.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// stubOrder tells the stub what to do, in the file COMMAND or COMMAND.POD.
type stubOrder struct {
	// Stall makes the call wait until the file is gone.
	Stall bool `json:",omitempty"`
	// Code and Msg make it fail.
	Code int    `json:",omitempty"`
	Msg  string `json:",omitempty"`
	// Addresses are what ADD returns.
	Addresses []string `json:",omitempty"`
}

// order writes an order for one command of one pod, or of all with an empty
// name. The file appears whole, and is gone when the test ends or undo is
// called.
func order(t *testing.T, d *daemon.Daemon, command, pod string, o stubOrder) (undo func()) {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	path := strings.TrimSuffix(filepath.Join(stubControl(d.Dir), command+"."+pod), ".")
	if err := os.WriteFile(path+".new", text, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	undo = func() {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			t.Errorf("end order: %v", err)
		}
	}
	t.Cleanup(undo)
	return undo
}

// stubCall is one call of the stub.
type stubCall struct {
	Command, ID, NetNS, IfName, Pod string
	Args                            map[string]string
	Conf                            json.RawMessage
	Pid                             int
	Begin                           time.Time
	End                             time.Time // zero while it lasts, or when it was killed
}

// stubCalls are the calls for one pod, oldest first.
func stubCalls(t *testing.T, d *daemon.Daemon, pod string) []stubCall {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(stubControl(d.Dir), "calls"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var calls []stubCall
	for line := range strings.Lines(string(text)) {
		var c stubCall
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatal(err)
		}
		if c.Pod != pod {
			continue
		}
		if c.End.IsZero() {
			calls = append(calls, c)
			continue
		}
		for i := range calls {
			if calls[i].Pid == c.Pid && calls[i].Begin.Equal(c.Begin) {
				calls[i] = c
			}
		}
	}
	return calls
}

// commandsOf lists the commands of calls, "ADD DEL".
func commandsOf(calls []stubCall) string {
	var names []string
	for _, c := range calls {
		names = append(names, c.Command)
	}
	return strings.Join(names, " ")
}

// stubMain is the plugin.
func stubMain() int {
	input, err := io.ReadAll(os.Stdin)
	must(err)
	var conf struct {
		CNIVersion, Control string
		PrevResult          json.RawMessage
		Addresses           []string
	}
	must(json.Unmarshal(input, &conf))
	call := stubCall{
		Command: os.Getenv("CNI_COMMAND"), ID: os.Getenv("CNI_CONTAINERID"), NetNS: os.Getenv("CNI_NETNS"),
		IfName: os.Getenv("CNI_IFNAME"), Args: map[string]string{}, Conf: input, Pid: os.Getpid(), Begin: time.Now(),
	}
	for arg := range strings.SplitSeq(os.Getenv("CNI_ARGS"), ";") {
		k, v, _ := strings.Cut(arg, "=")
		call.Args[k] = v
	}
	call.Pod = call.Args["K8S_POD_NAME"]
	call.note(conf.Control)
	o := call.obey(conf.Control)
	call.End = time.Now()
	call.note(conf.Control)
	if o.Code != 0 {
		fmt.Printf(`{"cniVersion": %q, "code": %d, "msg": %q}`, conf.CNIVersion, o.Code, o.Msg)
		return 1
	}
	switch {
	case call.Command == "VERSION":
		fmt.Println(`{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}`)
	case call.Command == "ADD" && conf.PrevResult != nil:
		fmt.Println(string(conf.PrevResult))
	case call.Command == "ADD":
		fmt.Println(call.result(conf.CNIVersion, append(o.Addresses, conf.Addresses...)))
	}
	return 0
}

// note appends the call to the book, in one write.
func (c stubCall) note(control string) {
	line, err := json.Marshal(c)
	must(err)
	f, err := os.OpenFile(filepath.Join(control, "calls"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	must(err)
	_, err = f.Write(append(line, '\n'))
	must(err)
	must(f.Close())
}

// obey carries out the order for the call, if any, and returns it.
func (c stubCall) obey(control string) stubOrder {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for _, path := range []string{c.Command + "." + c.Pod, c.Command} {
		o, found := readOrder(filepath.Join(control, path))
		if !found {
			continue
		}
		for o.Stall && found && time.Since(c.Begin) < stubPatience {
			<-tick.C
			_, found = readOrder(filepath.Join(control, path))
		}
		return o
	}
	return stubOrder{}
}

func readOrder(path string) (o stubOrder, found bool) {
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) || err == nil && len(text) == 0 {
		return o, false
	}
	must(err)
	must(json.Unmarshal(text, &o))
	return o, true
}

func (c stubCall) result(version string, addresses []string) string {
	if len(addresses) == 0 {
		addresses = []string{stubAddress}
	}
	type ip struct {
		Address   string `json:"address"`
		Interface int    `json:"interface"`
	}
	var ips []ip
	for _, a := range addresses {
		ips = append(ips, ip{Address: a})
	}
	text, err := json.Marshal(map[string]any{
		"cniVersion": version, "ips": ips,
		"interfaces": []any{map[string]string{"name": c.IfName, "sandbox": c.NetNS, "mac": "02:00:00:00:00:01"}},
	})
	must(err)
	return string(text)
}

// netnsMounts lists the pinned network namespaces of the daemon.
func netnsMounts(t *testing.T, d *daemon.Daemon) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], d.State) && strings.Contains(f[4], "/netns/") {
			found = append(found, f[4])
		}
	}
	return found
}

// ipamFile is where host-local notes that an address of the daemon's default
// network is given out.
func ipamFile(d *daemon.Daemon, ip string) string {
	s := d.Scope()
	return filepath.Join(s.IPAM, s.Network, ip)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil || !os.IsNotExist(err)
}

func inode(info os.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }
