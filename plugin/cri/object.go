package cri

import (
	"fmt"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Object names what a request is about, for package rpc: in words, and by ID.
func Object(req any) (object, id string) {
	switch r := req.(type) {
	case *cri.RunPodSandboxRequest:
		m := r.GetConfig().GetMetadata()
		return fmt.Sprintf("pod %s/%s", m.GetNamespace(), m.GetName()), ""
	case *cri.CreateContainerRequest:
		return "container " + r.GetConfig().GetMetadata().GetName(), r.GetPodSandboxId()
	case *cri.PullImageRequest:
		return "image " + r.GetImage().GetImage(), ""
	case *cri.RemoveImageRequest:
		return "image " + r.GetImage().GetImage(), ""
	case interface{ GetContainerId() string }:
		return "", r.GetContainerId()
	case interface{ GetPodSandboxId() string }:
		return "", r.GetPodSandboxId()
	}
	return "", ""
}
