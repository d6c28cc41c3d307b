"""ROS 2 without ROS: a node that speaks as rmw_zenoh does, on the package eclipse-zenoh alone."""
