package advisory

import "testing"

// TestRunc: how many things are known against a version, and against a plugin's.
func TestRunc(t *testing.T) {
	for text, want := range map[string]int{
		"1.0.3": 5, "1.1.4": 5, "1.1.5": 4, "1.1.5+ds1": 4, "1.1.12": 3, "1.1.14": 2, "1.1.99": 2,
		"1.2.0-rc.2": 3, "1.2.7": 2, "1.2.8": 1, "1.3.2": 2, "1.3.3": 1, "1.3.6": 0,
		"1.4.0-rc.2": 2, "1.4.0-rc.3": 1, "1.4.3": 0, "1.5.0-rc.2": 1, "1.5.2": 0, "2.0.0": 0,
	} {
		if got := Runc(Find(text)); len(got) != want {
			t.Errorf("runc %s: %v, want %d", text, got, want)
		}
	}
	for text, escape := range map[string]bool{"1.2.7": true, "1.2.8": false} {
		if got := Runc(Find(text)); got[0].Escape != escape {
			t.Errorf("the worst of runc %s is %v", text, got[0])
		}
	}
	for name, want := range map[string]int{"portmap": 1, "bridge": 0} {
		if got := Plugin(name, Find("v1.8.0")); len(got) != want {
			t.Errorf("%s: %v, want %d", name, got, want)
		}
	}
	if got := Plugin("portmap", Find("v1.9.0")); len(got) != 0 {
		t.Errorf("the corrected plugin has %v", got)
	}
}

func TestFind(t *testing.T) {
	for text, want := range map[string]string{
		"runc version 1.5.2\ncommit: v1.0.0": "1.5.2", "CNI bridge plugin v1.9.0": "1.9.0", "runc version 1.4.0-rc.3": "1.4.0-rc.3",
		"runc version 1.4.0~rc1": "1.4.0-rc.1", "runc version 1.1.5+ds1": "1.1.5+ds1", "runc version 1.2.5-0ubuntu1~24.04.1": "1.2.5+0ubuntu1.24.04.1",
		"runc version 1.5.0-rc.1+dev": "1.5.0-rc.1+dev", "crun version 1.21": "1.21.0", "CNI bridge plugin version unknown": "", "": "", "a 1 b": "",
	} {
		got := ""
		if v := Find(text); v != nil {
			got = v.String()
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func FuzzFind(f *testing.F) {
	for _, s := range []string{"runc version 1.5.2", "1.1.5+ds1-1+deb12u1", "v1.4.0~rc3", "01.002.0003-rc0009+x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		v := Find(text)
		if v == nil {
			return
		}
		again := Find(v.String())
		if again == nil || again.LessThan(v) || v.LessThan(again) {
			t.Errorf("%q is %v, which is %v", text, v, again)
		}
	})
}
