// Results in sections: a chart of intervals where a section has them.
for (const [section, rows] of Object.entries(DATA.charts)) intervals(byId(`chart-${section}`), rows);
startTheme();
startNavigation();
document.documentElement.dataset.ready = "true";
