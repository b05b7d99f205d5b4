package facts

// PluginEvent is what happens to a pod or a container, as the Node Resource
// Interface calls it.
type PluginEvent string

// The events of pods and containers. What has a present form is asked about and
// can be refused; the rest has happened.
const (
	PodRun     PluginEvent = "RunPodSandbox"
	PodUpdate  PluginEvent = "UpdatePodSandbox"
	PodUpdated PluginEvent = "PostUpdatePodSandbox"
	PodStopped PluginEvent = "StopPodSandbox"
	PodRemoved PluginEvent = "RemovePodSandbox"

	ContainerCreate  PluginEvent = "CreateContainer"
	ContainerCreated PluginEvent = "PostCreateContainer"
	ContainerStart   PluginEvent = "StartContainer"
	ContainerStarted PluginEvent = "PostStartContainer"
	ContainerUpdate  PluginEvent = "UpdateContainer"
	ContainerUpdated PluginEvent = "PostUpdateContainer"
	ContainerStopped PluginEvent = "StopContainer"
	ContainerRemoved PluginEvent = "RemoveContainer"
)
