"""Many devices and many processes: the mesh, joining and stopping, facts about accelerators."""
