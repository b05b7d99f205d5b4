package rootfs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantry-cri/gantry/plugin/facts"
)

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\n" +
		"# a comment\n\nbroken line\n" +
		"web:x:1000:1001:Web:/srv/web:/bin/sh\n" +
		"bare:x:1002:1002\n" +
		"huge:x:4294967296:0::/:\n" +
		"wrap:x:1003:4294967296::/:\n" +
		"web:x:0:0:second entry:/root:/bin/sh\n"
	groups = "root:x:0:\nwheel:x:10:root,web\nstaff:x:50:web\nwebs:x:1001:\nother:x:60:webmaster,bare2\n"
)

// newRoot makes a root filesystem with the given files.
func newRoot(t *testing.T, files map[string]string) *os.File {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return openDir(t, dir)
}

func openDir(t *testing.T, dir string) *os.File {
	t.Helper()
	root, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func ptr(v int64) *int64 { return &v }

func TestLookupUser(t *testing.T) {
	root := newRoot(t, map[string]string{"etc/passwd": passwd, "etc/group": groups})
	strict := cri.SupplementalGroupsPolicy_Strict
	rootUser := facts.User{Name: "root", Home: "/root", AdditionalGIDs: []uint32{0, 10}}
	web := facts.User{UID: 1000, GID: 1001, Name: "web", Home: "/srv/web", AdditionalGIDs: []uint32{1001, 10, 50}}
	for name, tc := range map[string]struct {
		req  UserRequest
		want facts.User
	}{
		"nothing given is root":      {UserRequest{}, rootUser},
		"number with an entry":       {UserRequest{RunAsUser: ptr(1000)}, web},
		"number without an entry":    {UserRequest{RunAsUser: ptr(4242)}, facts.User{UID: 4242, Home: "/", AdditionalGIDs: []uint32{0}}},
		"name":                       {UserRequest{RunAsUsername: "web"}, web},
		"name that is a number":      {UserRequest{RunAsUsername: "1000"}, web},
		"entry without home":         {UserRequest{RunAsUsername: "bare"}, facts.User{UID: 1002, GID: 1002, Name: "bare", Home: "/", AdditionalGIDs: []uint32{1002}}},
		"image user":                 {UserRequest{ImageUser: "web"}, web},
		"image number":               {UserRequest{ImageUser: "1000"}, web},
		"image user and group":       {UserRequest{ImageUser: "web:staff"}, facts.User{UID: 1000, GID: 50, Name: "web", Home: "/srv/web", AdditionalGIDs: []uint32{50, 10}}},
		"image numbers":              {UserRequest{ImageUser: "7:8"}, facts.User{UID: 7, GID: 8, Home: "/", AdditionalGIDs: []uint32{8}}},
		"image user, empty group":    {UserRequest{ImageUser: "web:"}, web},
		"CRI user beats image":       {UserRequest{RunAsUser: ptr(5), ImageUser: "web:staff"}, facts.User{UID: 5, Home: "/", AdditionalGIDs: []uint32{0}}},
		"CRI group":                  {UserRequest{RunAsUser: ptr(5), RunAsGroup: ptr(6)}, facts.User{UID: 5, GID: 6, Home: "/", AdditionalGIDs: []uint32{6}}},
		"CRI group of a named user":  {UserRequest{RunAsUsername: "web", RunAsGroup: ptr(6)}, facts.User{UID: 1000, GID: 6, Name: "web", Home: "/srv/web", AdditionalGIDs: []uint32{6, 10, 50}}},
		"supplemental groups merged": {UserRequest{RunAsUser: ptr(1000), SupplementalGroups: []int64{99, 50, 99}}, facts.User{UID: 1000, GID: 1001, Name: "web", Home: "/srv/web", AdditionalGIDs: []uint32{1001, 10, 50, 99}}},
		"supplemental groups strict": {UserRequest{RunAsUser: ptr(1000), SupplementalGroups: []int64{99}, Policy: strict}, facts.User{UID: 1000, GID: 1001, Name: "web", Home: "/srv/web", AdditionalGIDs: []uint32{1001, 99}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := LookupUser(root, tc.req)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestLookupUserErrors(t *testing.T) {
	root := newRoot(t, map[string]string{"etc/passwd": passwd, "etc/group": groups})
	for name, tc := range map[string]struct {
		req  UserRequest
		want error
	}{
		"unknown name":        {UserRequest{RunAsUsername: "nobody"}, errdefs.ErrNotFound},
		"unknown image user":  {UserRequest{ImageUser: "nobody"}, errdefs.ErrNotFound},
		"unknown image group": {UserRequest{ImageUser: "web:nogroup"}, errdefs.ErrNotFound},
		"group without user":  {UserRequest{RunAsGroup: ptr(5)}, errdefs.ErrInvalidArgument},
		"group, only image user": {
			UserRequest{RunAsGroup: ptr(5), ImageUser: "web"}, errdefs.ErrInvalidArgument},
		"image group alone":     {UserRequest{ImageUser: ":5"}, errdefs.ErrInvalidArgument},
		"user and name":         {UserRequest{RunAsUser: ptr(5), RunAsUsername: "web"}, errdefs.ErrInvalidArgument},
		"negative user":         {UserRequest{RunAsUser: ptr(-1)}, errdefs.ErrInvalidArgument},
		"negative group":        {UserRequest{RunAsUser: ptr(1), RunAsGroup: ptr(-1)}, errdefs.ErrInvalidArgument},
		"large supplemental":    {UserRequest{SupplementalGroups: []int64{1 << 31}}, errdefs.ErrInvalidArgument},
		"unknown policy":        {UserRequest{Policy: 7}, errdefs.ErrInvalidArgument},
		"named entry overflows": {UserRequest{RunAsUsername: "huge"}, errdefs.ErrInvalidArgument},
		"entry's gid overflows": {UserRequest{RunAsUsername: "wrap"}, errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := LookupUser(root, tc.req); !errors.Is(err, tc.want) {
				t.Errorf("got %+v, %v, want %v", got, err, tc.want)
			}
		})
	}
}

func TestLookupUserWithoutDatabase(t *testing.T) {
	root := newRoot(t, nil)
	got, err := LookupUser(root, UserRequest{RunAsUser: ptr(1000), SupplementalGroups: []int64{5}})
	want := facts.User{UID: 1000, Home: "/", AdditionalGIDs: []uint32{0, 5}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if _, err := LookupUser(root, UserRequest{RunAsUsername: "web"}); !errdefs.IsNotFound(err) {
		t.Errorf("name without passwd: %v, want NotFound", err)
	}
}

// Huge numbers became root, later they became names found in the image.
func TestCVE_2024_40635_CVE_2026_46680_NumbersNeverWrapNorBecomeNames(t *testing.T) {
	hostile := ""
	for _, n := range []string{"2147483648", "4294967296", "18446744073709551616", "00", "0x0", "1e3", "-1", "+0", ".5", "1_000", "0b1", "1e999999"} {
		hostile += n + ":x:0:0::/root:/bin/sh\n"
	}
	root := newRoot(t, map[string]string{"etc/passwd": hostile, "etc/group": hostile})
	for line := range strings.Lines(hostile) {
		user, _, _ := strings.Cut(line, ":")
		for _, req := range []UserRequest{{ImageUser: user}, {ImageUser: user + ":0"}, {ImageUser: "5:" + user}, {RunAsUsername: user}} {
			if got, err := LookupUser(root, req); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%+v: got %+v, %v, want InvalidArgument", req, got, err)
			}
		}
	}
	for _, n := range []int64{1 << 31, 1 << 32, -1, -1 << 31} {
		if _, err := LookupUser(root, UserRequest{RunAsUser: ptr(n)}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("run_as_user %d: %v, want InvalidArgument", n, err)
		}
	}
}

func TestParseIdentity(t *testing.T) {
	for _, name := range []string{"web", "3proxy", "www-data", "a.b", "nan", "inf", "_x", "dom\\user", "0a"} {
		if got, err := ParseIdentity(name); err != nil || got.Name != name || got.ID != nil {
			t.Errorf("%q: got %+v, %v, want the name", name, got, err)
		}
	}
	for _, n := range []uint32{0, 1, MaxID} {
		if got, err := ParseIdentity(strconv.Itoa(int(n))); err != nil || got.ID == nil || *got.ID != n {
			t.Errorf("%d: got %+v, %v, want the number", n, got, err)
		}
	}
	for _, bad := range []string{"a b", "a\n", "a\x00", "a,b", "a/b", "-a", "+", " 0", "0 ", strings.Repeat("a", 257)} {
		if got, err := ParseIdentity(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %+v, %v, want InvalidArgument", bad, got, err)
		}
	}
}

func TestCVE_2023_25173_CVE_2022_2995_PrimaryGroupIsInTheSet(t *testing.T) {
	root := newRoot(t, map[string]string{"etc/passwd": passwd, "etc/group": groups})
	for _, policy := range []cri.SupplementalGroupsPolicy{cri.SupplementalGroupsPolicy_Merge, cri.SupplementalGroupsPolicy_Strict} {
		for _, user := range []int64{0, 1000, 4242} {
			for _, extra := range [][]int64{nil, {7}, {0, 1001}} {
				got, err := LookupUser(root, UserRequest{RunAsUser: ptr(user), SupplementalGroups: extra, Policy: policy})
				if err != nil {
					t.Fatal(err)
				}
				if got.AdditionalGIDs[0] != got.GID {
					t.Errorf("user %d, groups %v: set %v does not start with %d", user, extra, got.AdditionalGIDs, got.GID)
				}
			}
		}
	}
}

func TestCVE_2022_4318_CVE_2026_15809_HomeWithLineBreakOrNULIsRefused(t *testing.T) {
	for _, home := range []string{"/x\x00y", "/x\ry"} {
		root := newRoot(t, map[string]string{"etc/passwd": "web:x:1000:1000::" + home + ":/bin/sh\n"})
		if got, err := LookupUser(root, UserRequest{RunAsUser: ptr(1000)}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("home %q: got %+v, %v, want InvalidArgument", home, got, err)
		}
	}
	// The two characters \ and n are no line break.
	root := newRoot(t, map[string]string{"etc/passwd": `web:x:1000:1000::/x\ny:/bin/sh` + "\n"})
	if got, err := LookupUser(root, UserRequest{RunAsUser: ptr(1000)}); err != nil || got.Home != `/x\ny` {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestCVE_2026_47262_CVE_2025_4437_UserDatabaseIsBounded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for device nodes")
	}
	line := "someone:x:77:77::/:/bin/sh\n"
	long := func(p string) error {
		f, err := os.Create(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString(strings.Repeat(line, maxDatabase/len(line)+2))
		return errors.Join(err, f.Truncate(5<<30))
	}
	sparse := func(p string) error {
		return errors.Join(os.WriteFile(p, []byte(line), 0o644), os.Truncate(p, 5<<30))
	}
	for name, make := range map[string]func(string) error{
		"5 GB of lines": long,
		"5 GB of NUL":   sparse,
		"FIFO":          func(p string) error { return unix.Mkfifo(p, 0o644) },
		"device":        func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))) },
		"directory":     func(p string) error { return os.Mkdir(p, 0o755) },
		"link to FIFO": func(p string) error {
			return errors.Join(unix.Mkfifo(p+".fifo", 0o644), os.Symlink(filepath.Base(p)+".fifo", p))
		},
		"link loop": func(p string) error { return os.Symlink(filepath.Base(p), p) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, file := range []string{"passwd", "group"} {
				dir := t.TempDir()
				files := map[string]string{"passwd": "web:x:1000:1000::/:\n", "group": ""}
				delete(files, file)
				if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
					t.Fatal(err)
				}
				for n, content := range files {
					if err := os.WriteFile(filepath.Join(dir, "etc", n), []byte(content), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				if err := make(filepath.Join(dir, "etc", file)); err != nil {
					t.Fatal(err)
				}
				got, err := LookupUser(openDir(t, dir), UserRequest{RunAsUser: ptr(1000)})
				if !errdefs.IsFailedPrecondition(err) {
					t.Errorf("%s: got %+v, %v, want FailedPrecondition", file, got, err)
				}
			}
		})
	}
}

// Links of the image stay inside the image (also the class of CVE-2022-23648).
func TestCVE_2022_23648_LinksStayInside(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("web:x:0:0::/:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{filepath.Join(outside, "secret"), "../../../../../../../.." + filepath.Join(outside, "secret")} {
		dir := t.TempDir()
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "etc"), 0o755), os.Symlink(target, filepath.Join(dir, "etc/passwd"))); err != nil {
			t.Fatal(err)
		}
		if got, err := LookupUser(openDir(t, dir), UserRequest{RunAsUsername: "web"}); !errdefs.IsNotFound(err) {
			t.Errorf("%s: got %+v, %v, want NotFound", target, got, err)
		}
	}
	// An absolute link is relative to the image's root.
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "etc"), 0o755), os.MkdirAll(filepath.Join(dir, "usr/db"), 0o755),
		os.WriteFile(filepath.Join(dir, "usr/db/passwd"), []byte("web:x:9:9::/:\n"), 0o644),
		os.Symlink("/usr/db/passwd", filepath.Join(dir, "etc/passwd"))); err != nil {
		t.Fatal(err)
	}
	if got, err := LookupUser(openDir(t, dir), UserRequest{RunAsUsername: "web"}); err != nil || got.UID != 9 {
		t.Errorf("link inside: got %+v, %v", got, err)
	}
}

func TestCVE_2024_21626_MagicLinksAreNotFollowed(t *testing.T) {
	for _, name := range []string{"self/root/etc/passwd", "self/cwd", "thread-self/root"} {
		if f, err := ResolveIn(openDir(t, "/proc"), name); err == nil {
			f.Close()
			t.Errorf("%s was followed", name)
		}
	}
	if _, err := ResolveIn(openDir(t, t.TempDir()), "a\x00b"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("NUL in a path: %v", err)
	}
	if _, err := Open(filepath.Join(t.TempDir(), "absent")); !errdefs.IsNotFound(err) {
		t.Errorf("absent root: %v", err)
	}
}

func FuzzPasswd(f *testing.F) {
	f.Add([]byte(passwd), "web", uint32(1000))
	f.Add([]byte("::::::\n:\n\n"), "", uint32(0))
	f.Add([]byte("web:x:1:1::\x00:"), "web", uint32(1))
	f.Fuzz(func(t *testing.T, data []byte, name string, id uint32) {
		for _, want := range []Identity{{Name: name}, {ID: &id}} {
			_ = scan(bytes.NewReader(data), func(line []byte) (bool, error) {
				acc, ok, err := matchPasswd(line, want)
				if !ok {
					return true, err
				}
				if acc.uid > MaxID || acc.gid > MaxID || want.ID != nil && acc.uid != *want.ID || want.ID == nil && acc.name != want.Name {
					t.Errorf("line %q gave %+v for %+v", line, acc, want)
				}
				return true, nil
			})
		}
	})
}

func FuzzGroup(f *testing.F) {
	f.Add([]byte(groups), "web", "staff")
	f.Add([]byte("a:x:99999999999:a\n"), "a", "a")
	f.Fuzz(func(t *testing.T, data []byte, user, name string) {
		dir := t.TempDir()
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "etc"), 0o755), os.WriteFile(filepath.Join(dir, "etc/group"), data, 0o644)); err != nil {
			t.Fatal(err)
		}
		root, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		ids, _ := memberships(root, user)
		if id, err := groupID(root, name); err == nil {
			ids = append(ids, id)
		}
		for _, id := range ids {
			if id > MaxID {
				t.Errorf("group id %d", id)
			}
		}
	})
}

func FuzzParseUser(f *testing.F) {
	for _, s := range []string{"", "0", "web:staff", "00", "1e3", "4294967296", "-1", ":", "a:b:c", "+0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		user, group, err := ParseUser(s)
		if err != nil {
			return
		}
		for _, id := range []Identity{user, group} {
			if id.ID != nil && (id.Name != "" || *id.ID > MaxID) {
				t.Errorf("%q: %+v", s, id)
			}
			if strings.ContainsAny(id.Name, ":\n\x00 ") {
				t.Errorf("%q: name %q", s, id.Name)
			}
		}
	})
}

func TestScanReportsReadErrors(t *testing.T) {
	broken := io.MultiReader(strings.NewReader("a\n"), errReader{})
	if err := scan(broken, func([]byte) (bool, error) { return true, nil }); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }
