// Package advisory knows published weaknesses of the programs that a node runs
// beside the daemon, and in which of their versions they are corrected.
//
// It is a list and a comparison: it runs no program and refuses nothing. Start
// reading at Runc.
package advisory

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/version"
)

// Version is a program's.
type Version = version.Version

// Advisory is a known weakness of a program.
type Advisory struct {
	// IDs are its numbers, What can happen.
	IDs, What string
	// Escape says that a container can get at the host by it.
	Escape bool
	// program is "" for every program of its list.
	program string
	// fixed are the first good versions, one per release line, oldest first.
	fixed []*Version
}

func versions(texts ...string) []*Version {
	out := make([]*Version, len(texts))
	for i, t := range texts {
		out[i] = version.MustParseSemantic(t)
	}
	return out
}

// ofRunc are what an operator should know before pods of strangers run, the worst
// first.
var ofRunc = []Advisory{
	{IDs: "CVE-2024-21626", Escape: true, fixed: versions("1.1.12"),
		What: "a container can reach the host's files through a leaked descriptor"},
	{IDs: "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881", Escape: true, fixed: versions("1.2.8", "1.3.3", "1.4.0-rc.3"),
		What: "a container can escape by redirecting masked paths, /dev/console or writes to /proc"},
	{IDs: "CVE-2026-41579", fixed: versions("1.3.6", "1.4.3", "1.5.0-rc.3"),
		What: "an image whose /dev is a link can make runc write on the host"},
	{IDs: "CVE-2024-45310", fixed: versions("1.1.14", "1.2.0-rc.3"),
		What: "a container can have empty files created on the host"},
	{IDs: "CVE-2023-27561, CVE-2023-28642, CVE-2023-25809", fixed: versions("1.1.5"),
		What: "an image whose /proc is a link can evade AppArmor and SELinux"},
}

var ofPlugins = []Advisory{
	{program: "portmap", IDs: "CVE-2025-67499", fixed: versions("1.9.0"),
		What: "with nftables, host ports take traffic that is for others"},
}

// Runc returns what is known against a version of runc, the worst first.
func Runc(v *Version) []Advisory { return against(ofRunc, "runc", v) }

// Plugin returns what is known against a version of the named CNI plugin.
func Plugin(name string, v *Version) []Advisory { return against(ofPlugins, name, v) }

func against(list []Advisory, program string, v *Version) (found []Advisory) {
	for _, a := range list {
		if (a.program == "" || a.program == program) && !a.fixedIn(v) {
			found = append(found, a)
		}
	}
	return found
}

// fixedIn reports whether v has the correction: it is at least the first good
// version of its own release line, or its line is newer than all that needed
// one.
func (a Advisory) fixedIn(v *Version) bool {
	for _, f := range a.fixed {
		if f.Major() == v.Major() && f.Minor() == v.Minor() {
			return v.AtLeast(f)
		}
	}
	return v.AtLeast(a.fixed[len(a.fixed)-1])
}

// String says what is wrong and where it is put right.
func (a Advisory) String() string {
	fixed := make([]string, len(a.fixed))
	for i, f := range a.fixed {
		fixed[i] = f.String()
	}
	return fmt.Sprintf("%s (%s, corrected in %s)", a.What, a.IDs, strings.Join(fixed, ", "))
}

// versionWord is the first thing in a text that looks like a version: two
// or three numbers, and what comes after them.
var versionWord = regexp.MustCompile(`(?m)(?:^|[\s=v])(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?([-+~][0-9A-Za-z.+~-]*)?`)

// preRelease is what precedes a version; anything else after the numbers is a
// distribution's: 1.1.5+ds1-1+deb12u1, 1.2.5-0ubuntu1~24.04.1.
var preRelease = regexp.MustCompile(`^[-~](alpha|beta|rc)[.-]?(\d{1,9})`)

// notBuild is what may not stand in build metadata.
var notBuild = regexp.MustCompile(`[^0-9A-Za-z]+`)

// Find finds the version in what a program says about itself, nil if it says none.
func Find(text string) *Version {
	m := versionWord.FindStringSubmatch(text)
	if m == nil {
		return nil
	}
	// As numbers: semantic versions have no leading zeroes.
	var n [3]uint64
	for i := range n {
		n[i], _ = strconv.ParseUint(m[i+1], 10, 32) // at most nine digits; none is 0
	}
	v := version.MustParseSemantic(fmt.Sprintf("%d.%d.%d", n[0], n[1], n[2]))
	rest := m[4]
	if pre := preRelease.FindStringSubmatch(rest); pre != nil {
		number, _ := strconv.ParseUint(pre[2], 10, 32)
		v = v.WithPreRelease(fmt.Sprintf("%s.%d", pre[1], number))
		rest = rest[len(pre[0]):]
	}
	if build := strings.Trim(notBuild.ReplaceAllString(rest, "."), "."); build != "" {
		v = v.WithBuildMetadata(build)
	}
	return v
}

// Patched reports whether a version is a distribution's own build, to which
// corrections may have been added without a new number.
func Patched(v *Version) bool { return v.BuildMetadata() != "" }
