package host

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"
)

// clockTick is the unit of times in /proc/PID/stat, in seconds: USER_HZ, which
// is 100 on every architecture that Go knows Linux on.
const clockTick = time.Second / 100

// ProcessStart is when a process began, by the kernel's books, to a hundredth
// of a second; zero if there is no such process.
func ProcessStart(pid uint32) time.Time {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return time.Time{}
	}
	uptime, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return time.Time{}
	}
	began, ok := startTicks(stat)
	up, ok2 := uptimeOf(uptime)
	if !ok || !ok2 {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(began)*clockTick - up)
}

// startTicks finds the 22nd field of /proc/PID/stat. The second one is a name
// in parentheses, in which anything may stand.
func startTicks(stat []byte) (uint64, bool) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, false
	}
	fields := bytes.Fields(stat[i+1:])
	if len(fields) < 20 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(fields[19]), 10, 63)
	return n, err == nil
}

// uptimeOf reads the first number of /proc/uptime, in seconds.
func uptimeOf(b []byte) (time.Duration, bool) {
	first, _, _ := bytes.Cut(b, []byte(" "))
	s, err := strconv.ParseFloat(string(first), 64)
	return time.Duration(s * float64(time.Second)), err == nil
}
