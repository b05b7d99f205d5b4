package node

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/version"
)

// advisory is a known weakness of a program.
type advisory struct {
	// program is "" for every program of its list.
	program string
	ids     string
	what    string
	status  Status
	// fixed are the first good versions, one per release line, oldest first.
	fixed []*version.Version
}

func versions(texts ...string) []*version.Version {
	out := make([]*version.Version, len(texts))
	for i, t := range texts {
		out[i] = version.MustParseSemantic(t)
	}
	return out
}

// runcAdvisories are what an operator should know before pods of strangers run,
// the worst first.
var runcAdvisories = []advisory{
	{ids: "CVE-2024-21626", status: Fail, fixed: versions("1.1.12"),
		what: "a container can reach the host's files through a leaked descriptor"},
	{ids: "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881", status: Fail, fixed: versions("1.2.8", "1.3.3", "1.4.0-rc.3"),
		what: "a container can escape by redirecting masked paths, /dev/console or writes to /proc"},
	{ids: "CVE-2026-41579", status: Warn, fixed: versions("1.3.6", "1.4.3", "1.5.0-rc.3"),
		what: "an image whose /dev is a link can make runc write on the host"},
	{ids: "CVE-2024-45310", status: Warn, fixed: versions("1.1.14", "1.2.0-rc.3"),
		what: "a container can have empty files created on the host"},
	{ids: "CVE-2023-27561, CVE-2023-28642, CVE-2023-25809", status: Warn, fixed: versions("1.1.5"),
		what: "an image whose /proc is a link can evade AppArmor and SELinux"},
}

var pluginAdvisories = []advisory{
	{program: "portmap", ids: "CVE-2025-67499", status: Warn, fixed: versions("1.9.0"),
		what: "with nftables, host ports take traffic that is for others"},
}

// fixedIn reports whether v has the correction: it is at least the first good
// version of its own release line, or its line is newer than all that needed
// one.
func (a advisory) fixedIn(v *version.Version) bool {
	for _, f := range a.fixed {
		if f.Major() == v.Major() && f.Minor() == v.Minor() {
			return v.AtLeast(f)
		}
	}
	return v.AtLeast(a.fixed[len(a.fixed)-1])
}

// String says what is wrong and where it is put right.
func (a advisory) String() string {
	fixed := make([]string, len(a.fixed))
	for i, f := range a.fixed {
		fixed[i] = f.String()
	}
	return fmt.Sprintf("%s (%s, corrected in %s)", a.what, a.ids, strings.Join(fixed, ", "))
}

// versionWord is the first thing in a text that looks like a version: two
// or three numbers, and what comes after them.
var versionWord = regexp.MustCompile(`(?m)(?:^|[\s=v])(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?([-+~][0-9A-Za-z.+~-]*)?`)

// preRelease is what precedes a version; anything else after the numbers is a
// distribution's: 1.1.5+ds1-1+deb12u1, 1.2.5-0ubuntu1~24.04.1.
var preRelease = regexp.MustCompile(`^[-~](alpha|beta|rc)[.-]?(\d{1,9})`)

// notBuild is what may not stand in build metadata.
var notBuild = regexp.MustCompile(`[^0-9A-Za-z]+`)

// findVersion finds the version in what a program says about itself, nil if it
// says none.
func findVersion(text string) *version.Version {
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

// patched reports whether a version is a distribution's own build, to which
// corrections may have been added without a new number.
func patched(v *version.Version) bool { return v.BuildMetadata() != "" }
