"""Train, measure and judge the sample checkpoint of kit/sample on pictures that this project draws itself."""
