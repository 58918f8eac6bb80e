"""Train, measure and judge the sample checkpoint of kit/sample on images that this project draws itself."""
