"""Where frames come from: cameras, network streams, video files, folders of pictures, recordings."""
