"""One file a command, one public function a file."""
