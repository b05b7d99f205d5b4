package config

import "testing"

func TestPins(t *testing.T) {
	var p Pins
	for _, pattern := range []string{"pause:3.10", "registry.k8s.io/kube-*", "*critical*"} {
		if err := p.add(pattern); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]bool{
		"docker.io/library/pause:3.10": true, "docker.io/library/pause:3.9": false,
		"registry.k8s.io/kube-proxy:v1": true, "registry.k8s.io/other:v1": false, "h/very-critical-app:1": true,
	} {
		if p.Match(name) != want {
			t.Errorf("%s: %t", name, !want)
		}
	}
	for _, bad := range []string{"", "*", "**", "a*b", "*a", "Not A Ref"} {
		if err := p.add(bad); err == nil {
			t.Errorf("%q is a pattern", bad)
		}
	}
}
